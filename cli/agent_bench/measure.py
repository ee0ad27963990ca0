"""From records to figures: what a load gave, and whether it held the floor.

Of the requests that ended after the ramp. A user's speed is that of one request from its first token to its last. The
slowest 5 % of them say whether a floor was held: a floor is a promise to everybody.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from tokenrelay.cli.agent_bench.records import Record, Settings

WITHIN = 0.99  # a floor counts as held down to so much of it: percentiles of whole tokens are not exact
ERRORS_MAX = 0.01  # more failures than this, and a load was not held
Figures = dict[str, Any]


def figures(
    records: Sequence[Record], window_s: tuple[float, float], load: float, settings: Settings, held_back: int = 0
) -> Figures:
    """One load's. Tokens a minute count prompt and output of requests that ended in the window."""
    begin_s, end_s = window_s
    seconds = max(end_s - begin_s, 1e-9)
    ended = [one for one in records if one.end != "cut" and begin_s <= one.end_s <= end_s]
    done = [one for one in ended if one.end == "done"]
    speeds = [one.tps for one in done if not math.isnan(one.tps)]
    prompt, output = sum(one.prompt_tokens for one in done), sum(one.output_tokens for one in done)
    per_minute = 60 / seconds / settings.devices
    errors = Counter(one.error or one.end for one in ended if one.end != "done")
    found: Figures = {
        "load": load,
        "unit": settings.unit,
        "seconds": round(seconds, 3),
        "requests": len(done),
        "turns_open_at_the_end": sum(one.end == "cut" for one in records),
        "failed": sum(one.end == "failed" for one in ended),
        "refused": sum(one.end == "refused" for one in ended),
        "late_arrivals": held_back,
        "errors": dict(errors.most_common(5)),
        "prompt_tokens": prompt,
        "output_tokens": output,
        "tpm_per_device": round((prompt + output) * per_minute, 1),
        "output_tpm_per_device": round(output * per_minute, 1),
        "tps": spread(speeds, worst_is_low=True),
        "ttft_s": spread([one.first_s - one.begin_s for one in done if not math.isnan(one.first_s)]),
        "itl_s": spread([gap for one in done for gap in one.gaps_s]),
        "request_s": spread([one.end_s - one.begin_s for one in done]),
        **hit_rates(done),
    }
    found["held"], found["why_not"] = verdict(found, settings)
    return found


def hit_rates(done: Iterable[Record]) -> Figures:
    """Prompt tokens from caches, as the endpoint counts them, beside what an infinite cache would have had."""
    done = list(done)
    told = [one for one in done if one.cached_tokens is not None]
    prompt, told_prompt = sum(one.prompt_tokens for one in done), sum(one.prompt_tokens for one in told)
    cached = sum(one.cached_tokens or 0 for one in told)
    return {
        "hit_rate": round(cached / told_prompt, 4) if told_prompt else None,
        "ideal_hit_rate": round(sum(one.ideal_tokens for one in done) / prompt, 4) if prompt else None,
    }


def verdict(found: Figures, settings: Settings) -> tuple[bool, str]:
    """(whether the load was held, why not)."""
    ended = found["requests"] + found["failed"] + found["refused"]
    if not ended:
        return False, "no request ended"
    if found["failed"] + found["refused"] > ERRORS_MAX * ended:
        return False, f"{found['failed'] + found['refused']} of {ended} requests failed"
    slowest = found["tps"]["p5"]
    if slowest is None:
        return False, "no answer had two tokens in two moments, so nobody's speed is known"
    if slowest < WITHIN * settings.floor:
        return False, f"the slowest 5 % got {slowest:.1f} tokens/s"
    first = found["ttft_s"]["p95"]
    if first is not None and first > settings.ttft_max_s:
        return False, f"95 % of first tokens took up to {first:.1f} s"
    return True, ""


def spread(values: Iterable[float], *, worst_is_low: bool = False) -> Figures:
    """Mean and percentiles (nearest rank), on the side where it hurts; null of none."""
    ordered = sorted(values)
    shares = (0.01, 0.05, 0.5, 0.95) if worst_is_low else (0.5, 0.9, 0.95, 0.99)
    found: Figures = {"mean": round(sum(ordered) / len(ordered), 5) if ordered else None}
    for share in shares:
        at = ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None
        found[f"p{round(100 * share)}"] = None if at is None else round(at, 5)
    return found


def best(loads: Iterable[Figures]) -> Figures | None:
    """The largest that was held, by tokens a minute."""
    held = [one for one in loads if one["held"]]
    return max(held, key=lambda one: float(one["tpm_per_device"])) if held else None

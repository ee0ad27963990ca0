"""How many blocks are found in the cache: reuse-aware eviction beside LRU and the offline optimum.

    python bench/eviction.py --trace conversation_trace.jsonl --trace synthetic_trace.jsonl
    python bench/eviction.py --quick                     # generated agents only
    python bench/eviction.py --trace T.jsonl --json result.json --svg docs/eviction.svg

Each request goes through the real scheduler (submit, plan, commit until it ends), one after the other, at the time it
arrived; the device takes no time. A block of 512 tokens is played by one of 16. The hit rate is the share of all
blocks of prompts that were found; each of them saves 512 tokens of prefill. The optimum knows the future
(bench/eviction_model/oracle.py). docs/eviction.md has the result and what it means.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

from eviction_model.oracle import hits_of_optimum  # noqa: E402 - once its folder is known
from eviction_model.plot import draw  # noqa: E402
from eviction_model.work import BLOCK_TOKENS, Agents, Request, read_trace  # noqa: E402
from scheduler import about  # noqa: E402

from tokenrelay.libscheduler import Config, Scheduler  # noqa: E402

PLAYED_TOKENS = 16  # a block, in the scheduler
SIZES = (1000, 2000, 4000, 8000, 16000, 32000)
POLICIES = ("lru", "reuse")


def play(requests: Sequence[Request], blocks: int, policy: str) -> tuple[int, float]:
    """(blocks found, seconds of CPU time) of all requests, in a pool of `blocks`."""
    longest = max(len(request.blocks) for request in requests) + 1
    scheduler = Scheduler(
        Config(
            block_tokens=PLAYED_TOKENS,
            blocks=blocks,
            slots=1,
            context_tokens=longest * PLAYED_TOKENS,
            step_tokens=longest * PLAYED_TOKENS,
            chunk_tokens=longest * PLAYED_TOKENS,
            hash_key=bytes(range(16)),
            model_identity=bytes(16),
            steps_in_flight=1,
            eviction=policy,
        )
    )
    began_s = time.process_time()
    found = 0
    sampled = np.zeros(1, np.uint32)
    for number, request in enumerate(requests):
        # One token more than the blocks: the last token of a prompt is always computed.
        ids = np.append(np.repeat(np.array(request.blocks, np.uint32), PLAYED_TOKENS), np.uint32(0))
        refused = scheduler.submit(
            number, ids, output_start=len(ids), tokens_max=1, tools=request.tools, now_us=request.at_us
        )
        assert refused is None, f"request {number} was refused: {refused}"
        plan = scheduler.plan(request.at_us)
        assert plan is not None and plan.samples[-1], "a prompt fits one step"
        found += int(scheduler.commit(plan.step, sampled, request.at_us, 0).cached_tokens[0]) // PLAYED_TOKENS
        scheduler.take_cache_events()
    seconds = time.process_time() - began_s
    scheduler.check()
    return found, seconds


def measure(name: str, requests: Sequence[Request], sizes: Sequence[int], out: Console) -> list[dict[str, Any]]:
    """A row for each size of the cache and each policy."""
    total = sum(len(request.blocks) for request in requests)
    chains = [request.blocks for request in requests]
    rows: list[dict[str, Any]] = []
    for blocks in sizes:
        found = {policy: play(requests, blocks, policy) for policy in POLICIES}
        found["optimum"] = (hits_of_optimum(chains, blocks), 0.0)
        for policy, (hits, seconds) in found.items():
            rows.append(
                {
                    "workload": name,
                    "blocks": blocks,
                    "policy": policy,
                    "hit_rate": round(hits / total, 5),
                    "prefill_tokens_saved": hits * BLOCK_TOKENS,
                    "prefill_tokens": (total - hits) * BLOCK_TOKENS,
                    "cpu_s": round(seconds, 2),
                }
            )
        out.print(f"{name}, {blocks} blocks: " + ", ".join(f"{p} {h / total:.2%}" for p, (h, _) in found.items()))
    return rows


def show(rows: Sequence[dict[str, Any]], out: Console) -> None:
    """The table of docs/eviction.md."""
    table = Table("workload", "blocks", "lru", "reuse", "optimum", "of the gap closed", "prefill, against lru")
    for workload, blocks in dict.fromkeys((row["workload"], row["blocks"]) for row in rows):
        rate, left = (
            {row["policy"]: row[key] for row in rows if (row["workload"], row["blocks"]) == (workload, blocks)}
            for key in ("hit_rate", "prefill_tokens")
        )
        gap = rate["optimum"] - rate["lru"]
        table.add_row(
            workload,
            str(blocks),
            *(f"{rate[policy]:.2%}" for policy in (*POLICIES, "optimum")),
            f"{(rate['reuse'] - rate['lru']) / gap:.0%}" if gap > 1e-4 else "-",
            f"{left['reuse'] / left['lru'] - 1:+.1%}",
        )
    out.print(table)


def main() -> int:
    """Play everything, print the table, write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", action="append", default=[], type=Path, metavar="FILE", help="repeatable")
    parser.add_argument("--quick", action="store_true", help="small: less than 50 s on an idle machine")
    parser.add_argument("--json", metavar="FILE", help="write the result here (-: stdout)")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the picture here")
    parser.add_argument("--seed", type=int, default=1, help="of the generated agents")
    options = parser.parse_args()
    began_s = time.monotonic()
    out = Console(stderr=options.json == "-", width=130)
    agents = Agents(options.seed, 60, 0.5) if options.quick else Agents(options.seed, 400, 2.0)
    works = {"agents": agents.requests()}
    for path in options.trace:
        works[path.stem.removesuffix("_trace")] = read_trace(path, 2000 if options.quick else None)
    sizes = (500, 2000) if options.quick else SIZES
    rows = [row for name, requests in works.items() for row in measure(name, requests, sizes, out)]
    result = {
        "bench": "eviction",
        **about(),
        "versions": {"python": sys.version.split()[0], "numpy": np.__version__},
        "quick": options.quick,
        "seed": options.seed,
        "requests": {name: len(requests) for name, requests in works.items()},
        "seconds": round(time.monotonic() - began_s, 1),
        "results": rows,
    }
    show(rows, out)
    if options.svg:
        options.svg.write_text(draw(rows), encoding="utf-8")
    if options.json == "-":
        print(json.dumps(result))
    elif options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

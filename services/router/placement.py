"""Whether a prompt is computed by a prefill worker or where it is decoded, decided per sequence and explained.

    decision = decide(tokens, cached, destination, sources, handovers, config)
    decision.source          # the prefill worker, or None: one worker does all of it
    decision.text            # "prefill at unix:/run/p0.sock: 5,000 of 8,192 tokens are to be computed; …"

What a worker computes is counted in tokens: those of the prompt that its cache lacks, and for a prefill worker those of
the prompts that this router has there already. A remote prefill keeps a prompt out of the steps of running answers; it
costs a message to and fro, the copy of the KV, and the wait behind other prompts there.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokenrelay.services.chassis.client import WorkerClient
from tokenrelay.services.router.config import RouterConfig

PAUSE_S = 1.0  # after the ledger refused a handle: so long nobody asks for another one
PREFILL_ROLE = "prefill"


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a prompt is computed, and why."""

    source: WorkerClient | None
    reason: str  # one of few words, for counters
    text: str
    tokens: int = 0  # that the source has to compute


class Handovers:
    """What a router knows about handovers at large. Event loop only."""

    def __init__(self) -> None:
        self.suspended = ""  # why no kvstore answers
        self.queued: Counter[str] = Counter()  # tokens of prompts at prefill workers, by target
        self.decisions: Counter[tuple[str, str]] = Counter()  # ("remote" or "alone", reason)
        self.ends: Counter[str] = Counter()  # how handovers ended: "done", "first_token", "aborted", or their cause
        self._paused_until_s = 0.0
        self._pause_reason = ""

    def pause(self, reason: str) -> None:
        """The ledger refused a handle: others need not try for a moment."""
        self._paused_until_s = time.monotonic() + PAUSE_S
        self._pause_reason = reason

    @property
    def why_not(self) -> str:
        """Why nothing can be handed over now; empty: it can."""
        if self.suspended:
            return f"no kvstore answers ({self.suspended})"
        return self._pause_reason if time.monotonic() < self._paused_until_s else ""


def is_source(client: WorkerClient) -> bool:
    """Whether prompts go there to be handed over."""
    return client.handshake is not None and client.handshake.role == PREFILL_ROLE


def decide(
    tokens: int,
    cached: Mapping[str, int],
    destination: WorkerClient,
    sources: Sequence[WorkerClient],
    handovers: Handovers,
    config: RouterConfig,
) -> Decision:
    """Where the text of a sequence, `tokens` long, is computed that `destination` will decode.

    `cached`: tokens of it in workers' caches, by target. `sources`: usable prefill workers.
    """
    if config.remote_prefill == "never":
        return Decision(None, "never", "router.remote_prefill is never")
    sources = [source for source in sources if source is not destination]
    if is_source(destination) or not sources:
        missing = "decode" if is_source(destination) else "prefill"
        return Decision(None, f"no_{missing}", f"no {missing} worker is usable: one worker does all of it")
    if why_not := handovers.why_not:
        return Decision(None, "ledger", f"nothing can be handed over now: {why_not}")
    source = min(sources, key=lambda one: (_cost(tokens, cached, one, handovers), one.open_count))
    uncached = max(1, tokens - cached.get(destination.target, 0))
    there = max(1, tokens - cached.get(source.target, 0))
    said = f"{uncached} of {tokens} tokens are not in the cache of {destination.target}"
    if config.remote_prefill == "always":
        return Decision(source, "always", f"prefill at {source.target}: router.remote_prefill is always; {said}", there)
    floor, minimum = destination.stats.tps_floor, config.remote_tokens_min
    if floor.users_below and destination.handshake is not None:  # each step counts there
        minimum = min(minimum, destination.handshake.block_tokens)
    if uncached < minimum:
        return Decision(None, "short", f"{said}, fewer than {minimum}: they are computed where they are decoded")
    cost = _cost(tokens, cached, source, handovers)
    bound = uncached * (config.remote_queue_factor if destination.open_count else 1.0)
    if cost > bound and not floor.users_below:
        text = f"{said}, and the least busy prefill worker, {source.target}, has {cost} tokens to compute until then"
        return Decision(None, "busy", text)
    below = f"; {floor.users_below} answers there are below their floor" if floor.users_below else ""
    return Decision(source, "pays", f"prefill at {source.target}: {said}{below}", there)


def _cost(tokens: int, cached: Mapping[str, int], source: WorkerClient, handovers: Handovers) -> int:
    """Tokens that are computed there until this prompt is done."""
    return handovers.queued[source.target] + max(1, tokens - cached.get(source.target, 0))

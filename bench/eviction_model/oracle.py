"""The offline optimum (Belady, 1966): what is wanted again last goes first.

It knows the future and owes nothing to the scheduler's code. Prefix chains are respected by themselves: a block is
wanted whenever one that follows it is, so its next use is no later; between equals the deeper one goes. A block that
will never be wanted again may go at once. No policy that must keep a prefix under its children can hit more.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

NEVER = 1 << 60


def hits_of_optimum(chains: Sequence[Sequence[int]], capacity: int) -> int:
    """Blocks found by all requests together in a cache of `capacity` blocks."""
    wanted: dict[int, int] = {}
    next_use: list[list[int]] = []
    for number in range(len(chains) - 1, -1, -1):
        next_use.append([wanted.get(block, NEVER) for block in chains[number]])
        wanted.update((block, number) for block in chains[number])
    next_use.reverse()
    cached: dict[int, int] = {}
    farthest: list[tuple[int, int, int]] = []  # (-next use, -depth, block); entries that are not true any more stay
    hits = 0
    for chain, uses in zip(chains, next_use, strict=True):
        for block in chain:
            if block not in cached:
                break
            hits += 1
        for depth, (block, use) in enumerate(zip(chain, uses, strict=True)):
            cached[block] = use
            heapq.heappush(farthest, (-use, -depth, block))
        while len(cached) > capacity:
            use, _, block = heapq.heappop(farthest)
            if cached.get(block) == -use:
                del cached[block]
    return hits

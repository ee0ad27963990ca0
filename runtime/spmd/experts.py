"""Which rank computes which expert: load is measured, busy experts get replicas, and both move between steps.

    table = place_experts(loads, blocks=8, slots=33)        # [blocks][slots] experts: 8 ranks, 33 places each
    places = ExpertPlaces(table, experts=256)
    places.of(experts)                                      # int32 [t, k] expert -> place, replicas taken in turn

After DeepSeek's EPLB (arXiv:2412.19437, section 3.4): the expert with the most load by replica gets another one until
all places are taken, then the heaviest goes to the least busy rank. A block is the experts of one rank (of one place
along tp where tp cuts widths). All ranks work a table out from the same counts, and read what they lack from the
checkpoint before the next step; nothing else of a step depends on where an expert is.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

NOBODY = -1  # an empty place
Table = list[list[int]]  # [blocks][slots]: the expert in each place


def initial_table(experts: int, blocks: int, slots: int) -> Table:
    """Experts in order, as they are loaded; spare places are empty."""
    held = experts // blocks
    return [[b * held + i if i < held else NOBODY for i in range(slots)] for b in range(blocks)]


def place_experts(loads: Sequence[int], blocks: int, slots: int, before: Table | None = None) -> Table:
    """Experts in `blocks` of `slots` places, each at least once. An expert that stays in its block keeps its place.

    `blocks * slots` is at least the number of experts. A block holds an expert once; where that cannot be, a place
    stays empty.
    """
    experts = len(loads)
    replicas = [1] * experts
    heap = [(-float(load), expert) for expert, load in enumerate(loads)]
    heapq.heapify(heap)
    for _ in range(blocks * slots - experts):
        while heap and replicas[heap[0][1]] == blocks:
            heapq.heappop(heap)
        if not heap:
            break
        _, expert = heap[0]
        replicas[expert] += 1
        heapq.heapreplace(heap, (-loads[expert] / replicas[expert], expert))
    items = sorted(((loads[e] / replicas[e], e) for e in range(experts) for _ in range(replicas[e])), reverse=True)
    chosen: list[set[int]] = [set() for _ in range(blocks)]
    busy = [0.0] * blocks
    homes = [set(row) for row in before] if before else chosen
    for load, expert in items:  # no more than there are places, so an expert's first replica always finds one
        room = [b for b in range(blocks) if len(chosen[b]) < slots and expert not in chosen[b]]
        if room:
            block = min(room, key=lambda b: (busy[b], expert not in homes[b], b))
            chosen[block].add(expert)
            busy[block] += load
    return [_in_place(chosen[b], before[b] if before else [], slots) for b in range(blocks)]


def _in_place(chosen: set[int], before: Sequence[int], slots: int) -> list[int]:
    made = [expert if expert in chosen else NOBODY for expert in before] or [NOBODY] * slots
    fresh = iter(sorted(chosen - set(made)))
    return [expert if expert != NOBODY else next(fresh, NOBODY) for expert in made]


def block_loads(table: Table, loads: Sequence[int]) -> list[float]:
    """What each block computes: an expert's load is dealt out evenly to its replicas."""
    count = [0] * len(loads)
    for expert in (e for row in table for e in row if e != NOBODY):
        count[expert] += 1
    return [sum(loads[e] / count[e] for e in row if e != NOBODY) for row in table]


class ExpertPlaces:
    """A table as tensors, for routing."""

    def __init__(self, table: Table, experts: int) -> None:
        slots = len(table[0])
        places: list[list[int]] = [[] for _ in range(experts)]
        for block, row in enumerate(table):
            for slot, expert in enumerate(row):
                if expert != NOBODY:
                    places[expert].append(block * slots + slot)
        assert all(places), "an expert is nowhere"
        widest = max(map(len, places))
        self.table = table
        self._count = torch.tensor([len(found) for found in places])  # [E]
        self._places = torch.tensor([found + found[:1] * (widest - len(found)) for found in places], dtype=torch.int32)

    def of(self, experts: Tensor) -> Tensor:
        """int [t, k] experts -> int32 [t, k] places: the replicas of an expert take tokens in turn."""
        chosen = experts.long()
        turn = torch.arange(chosen.shape[0], device=chosen.device).unsqueeze(1) % self._count[chosen]
        return self._places[chosen, turn]

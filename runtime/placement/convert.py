"""The cheapest sequence of moves from one layout to another: Dijkstra over layouts, a handful of states."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator

from tokenrelay.runtime.placement.cost import CostModel
from tokenrelay.runtime.placement.ir import Layouts, Move, Value, after
from tokenrelay.runtime.placement.mesh import AXES, Mesh
from tokenrelay.runtime.placement.placements import Partial, Shard

STATES_MAX = 4096  # 3 axes, 4 placements each, are 64


class Converter:
    """Answers for one mesh and one cost model, each question worked out once."""

    def __init__(self, mesh: Mesh, cost: CostModel) -> None:
        self._mesh = mesh
        self._cost = cost
        self._axes = tuple(axis for axis in AXES if mesh.size(axis) > 1)
        self._known: dict[tuple[object, ...], tuple[Move, ...] | None] = {}

    def path(self, value: Value, want: Layouts) -> tuple[Move, ...] | None:
        """Moves (their values are not named yet) that place `value` as `want`; None where there are none."""
        key = (value.shape, value.layouts, value.stacked, want)
        if key not in self._known:
            self._known[key] = self._search(value, want)
        return self._known[key]

    def _search(self, value: Value, want: Layouts) -> tuple[Move, ...] | None:
        order = itertools.count()  # ties: the first found
        heap: list[tuple[float, int, Layouts, tuple[Move, ...]]] = [(0.0, next(order), value.layouts, ())]
        done: set[Layouts] = set()
        while heap and len(done) < STATES_MAX:
            cost, _, at, path = heapq.heappop(heap)
            if at == want:
                return path
            if at in done:
                continue
            done.add(at)
            for move in self._moves(value, at):
                made = after(at, move)
                if made is not None and made not in done and self._divides(value, made):
                    seconds = cost + self._cost.move_s(move, value, at, made, self._mesh) + 1e-12
                    heapq.heappush(heap, (seconds, next(order), made, (*path, move)))
        return None

    def _moves(self, value: Value, at: Layouts) -> Iterator[Move]:
        dims = range(len(value.shape) - (1 if value.stacked > 1 else 0))
        for axis in self._axes:
            have = at[AXES.index(axis)]
            if isinstance(have, Shard):
                if have.dim in dims:
                    yield Move("all_gather", (axis,), "", "", have.dim)
                    yield from (Move("all_to_all", (axis,), "", "", d, have.dim) for d in dims if d != have.dim)
            else:
                kind = "reduce_scatter" if have == Partial() else "slice"
                yield from (Move(kind, (axis,), "", "", d) for d in dims)
        partial = [axis for axis in self._axes if at[AXES.index(axis)] == Partial()]
        for count in range(1, len(partial) + 1):
            for axes in itertools.combinations(partial, count):
                yield Move("all_reduce", axes, "", "")

    def _divides(self, value: Value, layouts: Layouts) -> bool:
        for dim, size in enumerate(value.shape):
            cut = 1
            for axis, placement in zip(AXES, layouts, strict=True):
                cut *= self._mesh.size(axis) if placement == Shard(dim) else 1
            if (self._cost.tokens if size is None else size) % cut:
                return False
        return True

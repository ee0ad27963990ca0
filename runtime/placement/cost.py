"""What a move is taken to cost: bytes over the link's speed, plus a latency for each phase.

With n ranks in the group and B the bytes that a rank holds of the larger side, each rank sends (Thakur, Rabenseifner
and Gropp, "Optimization of Collective Communication Operations in MPICH", 2005, ring and pairwise algorithms):

    all_reduce 2 (n - 1) / n B in two phases; all_gather, reduce_scatter (n - 1) / n B; all_to_all (n - 1) / n B of what
    it holds; slice nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tokenrelay.runtime.placement.ir import Call, Layouts, Move, Value
from tokenrelay.runtime.placement.mesh import AXES, Mesh
from tokenrelay.runtime.placement.placements import Shard


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Links and memory. The defaults are public figures of an H100 SXM host with 400 Gb/s a GPU between hosts."""

    tokens: int = 64  # of one step, all dp ranks together
    element_bytes: int = 2
    host_ranks: int = 8  # ranks that share the fast link
    link_bytes_s: float = 450e9  # NVLink 4, one direction
    link_latency_s: float = 5e-6
    network_bytes_s: float = 50e9
    network_latency_s: float = 15e-6
    memory_bytes_s: float = 3.35e12
    flops_s: float = 990e12  # dense bfloat16

    def local_bytes(self, value: Value, layouts: Layouts, mesh: Mesh) -> float:
        """Bytes that one rank holds of `value` when it is placed as `layouts`."""
        whole = math.prod(self.tokens if size is None else size for size in value.shape) * self.element_bytes
        cut = math.prod(mesh.size(a) for a, p in zip(AXES, layouts, strict=True) if isinstance(p, Shard))
        return whole / cut

    def sent_bytes(self, move: Move, value: Value, before: Layouts, made: Layouts, mesh: Mesh) -> float:
        """Bytes that one rank sends."""
        if move.kind == "slice":
            return 0.0
        n = math.prod(mesh.size(axis) for axis in move.axes)
        most = max(self.local_bytes(value, before, mesh), self.local_bytes(value, made, mesh))
        return (2 if move.kind == "all_reduce" else 1) * (n - 1) / n * most

    def exchanged_bytes(self, call: Call, values: Mapping[str, Value], mesh: Mesh, chosen: int) -> tuple[float, float]:
        """Bytes that one rank sends so that its tokens meet `chosen` experts each, and for what comes back.

        Choices are taken to be uniform: a token goes to an expected number of the other ranks. With it go its `chosen`
        numbers and weights, four bytes each.
        """
        x = values[call.inputs[0][1]]
        n = math.prod(mesh.size(axis) for axis in call.sends)
        ranks = n * (1 - (1 - 1 / n) ** chosen) * (n - 1) / n  # other ranks that hold one of its experts
        tokens = self.local_bytes(x, x.layouts, mesh) / (math.prod(s for s in x.shape if s) * self.element_bytes)
        row = x.shape[-1] or 0
        return ranks * tokens * (row * self.element_bytes + 8 * chosen), ranks * tokens * row * self.element_bytes

    def group_s(self, axes: tuple[str, ...], sent_bytes: float, phases: int, mesh: Mesh) -> float:
        """Seconds of `phases` that send so many bytes among the ranks along `axes`."""
        span = max(group[-1] - group[0] + 1 for group in mesh.groups(axes)[:1])
        near = span <= self.host_ranks
        speed = self.link_bytes_s if near else self.network_bytes_s
        return phases * (self.link_latency_s if near else self.network_latency_s) + sent_bytes / speed

    def move_s(self, move: Move, value: Value, before: Layouts, made: Layouts, mesh: Mesh) -> float:
        """Seconds of a move."""
        if move.kind == "slice":
            return 0.0
        phases = 2 if move.kind == "all_reduce" else 1
        return self.group_s(move.axes, self.sent_bytes(move, value, before, made, mesh), phases, mesh)

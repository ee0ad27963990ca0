"""One rank's side of experts by load: counts what is chosen, and moves experts between steps (`experts.py`).

balancer.count(layer, experts)             # in each step
balancer.replace()                         # on all ranks, between two steps
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tokenrelay.runtime.layers.moe import Experts
from tokenrelay.runtime.models.decoder import Model
from tokenrelay.runtime.placement import AXES, STAGES, TOKEN_AXES, Mesh
from tokenrelay.runtime.placement.ir import Move
from tokenrelay.runtime.placement.stages import stage_layers
from tokenrelay.runtime.spmd.comm import Comm
from tokenrelay.runtime.spmd.experts import NOBODY, ExpertPlaces, block_loads, initial_table, place_experts
from tokenrelay.runtime.spmd.shard import cuts_of
from tokenrelay.runtime.weights.loader import read_experts


@dataclass(frozen=True, slots=True)
class Replaced:
    """What a re-placement did in the leader's pipeline stage."""

    moved: int  # experts that were read anew, on all ranks together
    before: float  # the busiest rank's load by the mean, the worst layer's, as it was
    after: float


class Balancer:
    """The experts of one rank's layers: where each is, and how often each was chosen."""

    def __init__(self, model: Model, comm: Comm, mesh: Mesh, rank: int, folder: Path) -> None:
        self._model, self._comm, self._mesh, self._rank, self._folder = model, comm, mesh, rank, folder
        at = mesh.coordinates(rank)
        layers = stage_layers(len(model.layers), at[STAGES], mesh.size(STAGES))
        self._modules = {
            layer: module
            for layer in layers
            if isinstance(module := getattr(model.layers[layer].mlp, "experts", None), Experts)
        }
        # One rank of those that see the same tokens counts.
        self._counts = not any(at[axis] for axis in AXES if axis not in TOKEN_AXES)
        self._at = at
        self._places: dict[int, ExpertPlaces] = {}
        self._seen: dict[int, Tensor] = {}
        for layer, module in self._modules.items():
            cut = cuts_of(module.boundary.parameters["w_down"], 3, mesh, at)[0]
            experts, slots = module.moe.experts, module.w_down.shape[0]
            self._block = cut.index
            self._places[layer] = ExpertPlaces(initial_table(experts, cut.count, slots), experts)
            self._seen[layer] = torch.zeros(experts, dtype=torch.int64)
        axes = tuple(axis for axis in AXES if mesh.size(axis) > 1)
        comm.connect(axes)
        self._sum = comm.mover(Move("all_reduce", axes, "", ""))

    def places(self, layer: int, experts: Tensor) -> Tensor:
        """int32 [t, k] experts -> places, numbered over all ranks."""
        return self._places[layer].of(experts)

    def count(self, layer: int, experts: Tensor, real: int, *, gathered: bool) -> None:
        """Remember what this rank's own tokens chose: `real` rows from where they stand among those of all."""
        if not self._counts:
            return
        rows = experts.shape[0] // (self._mesh.size("dp") if gathered else 1)
        first = self._at["dp"] * rows if gathered else 0
        own = experts[first : first + min(real, rows)]
        seen = self._seen[layer]
        seen += torch.bincount(own.flatten().long(), minlength=len(seen))

    def replace(self) -> Replaced:
        """Work out where experts should be from what all ranks counted, read what is new here, and start anew."""
        if not self._modules:
            return Replaced(0, 1.0, 1.0)
        mine = torch.stack(list(self._seen.values())) if self._counts else None
        zeros = torch.zeros((len(self._seen), len(next(iter(self._seen.values())))), dtype=torch.int64)
        loads = self._sum(zeros if mine is None else mine).tolist()
        wanted: dict[tuple[int, int], int] = {}
        moved, before, after = 0, 1.0, 1.0
        for layer, load in zip(self._modules, loads, strict=True):
            old = self._places[layer].table
            new = place_experts(load, len(old), len(old[0]), old)
            for block, (row, was) in enumerate(zip(new, old, strict=True)):
                fresh = {(layer, slot): expert for slot, expert in enumerate(row) if expert not in (NOBODY, was[slot])}
                moved += len(fresh)
                if block == self._block:
                    wanted |= fresh
            before, after = max(before, _peak(block_loads(old, load))), max(after, _peak(block_loads(new, load)))
            self._places[layer] = ExpertPlaces(new, len(load))
            self._seen[layer].zero_()
        read_experts(self._folder, self._model, wanted, self._mesh, self._rank)
        return Replaced(moved, round(before, 3), round(after, 3))


def _peak(loads: list[float]) -> float:
    mean = sum(loads) / len(loads)
    return max(loads) / mean if mean else 1.0

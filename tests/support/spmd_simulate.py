"""Runs a compiled program on all ranks of a mesh within one process: the meaning of each operation, written plainly."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tokenrelay.runtime.placement import AXES, Mesh, Shard
from tokenrelay.runtime.placement.ir import Add, Call, Layouts, Move, Part, Program, ReduceNorm, Start

Compute = Callable[[str, dict[str, Tensor], dict[str, int]], dict[str, Tensor]]  # module, inputs, coordinates


def piece(whole: Tensor, layouts: Layouts, mesh: Mesh, at: Mapping[str, int]) -> Tensor:
    """What the rank at `at` holds of `whole`."""
    for axis, placement in zip(AXES, layouts, strict=True):
        if isinstance(placement, Shard):
            whole = whole.chunk(mesh.size(axis), placement.dim)[at[axis]]
    return whole


def simulate(program: Program, inputs: Mapping[str, Tensor], compute: Compute) -> dict[str, list[Tensor]]:
    """Whole inputs by port -> outputs by port, one tensor for each rank."""
    mesh = program.mesh
    places = [mesh.coordinates(rank) for rank in range(mesh.ranks)]
    held = {
        value: [piece(inputs[port], program.values[value].layouts, mesh, at) for at in places]
        for port, value in program.inputs
    }

    def call(op: Call) -> None:
        made = [
            compute(op.module, {port: held[v][rank] for port, v in op.inputs}, at) for rank, at in enumerate(places)
        ]
        for port, value in op.outputs:
            held[value] = [outputs[port] for outputs in made]

    for op in program.ops:
        match op:
            case Call():
                call(op)
            case Move():
                held[op.target] = _moved(op, held[op.source], mesh)
            case Start():  # at once: nothing that follows may depend on when it ends
                held[op.move.target] = _moved(op.move, held[op.move.source], mesh)
            case ReduceNorm():
                held[op.move.target] = _moved(op.move, held[op.move.source], mesh)
                call(op.call)
            case Part():
                held[op.target] = [tensor[..., op.first : op.end] for tensor in held[op.source]]
            case Add():
                held[op.target] = [sum(held[s][rank] for s in op.sources) for rank in range(mesh.ranks)]  # type: ignore[misc]
    return {port: held[value] for port, value in program.outputs}


def _moved(move: Move, held: list[Tensor], mesh: Mesh) -> list[Tensor]:
    made: list[Tensor] = list(held)
    for group in mesh.groups(move.axes):
        tensors = [held[rank] for rank in group]
        for i, rank in enumerate(group):
            match move.kind:
                case "all_reduce":
                    made[rank] = torch.stack(tensors).sum(0)
                case "reduce_scatter":
                    made[rank] = torch.stack(tensors).sum(0).chunk(len(group), move.dim)[i]
                case "all_gather":
                    made[rank] = torch.cat(tensors, move.dim)
                case "all_to_all":
                    made[rank] = torch.cat(tensors, move.from_dim).chunk(len(group), move.dim)[i]
                case "slice":
                    made[rank] = held[rank].chunk(len(group), move.dim)[i]
    return made

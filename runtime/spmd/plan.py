"""What a model would do on a mesh: collectives, bytes and predicted time per layer, from config.json alone.

    plan = make_plan(Path("DeepSeek-V3"), Mesh(tp=8, dp=8), CostModel(tokens=64), whole_experts=True)
    for group in plan.groups: print(group.name, group.move_s)

No weights are read and no device is touched: the model is built on torch's meta device.
"""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from tokenrelay.base.errors import CheckpointError, PlacementError
from tokenrelay.runtime.layers.moe import Experts
from tokenrelay.runtime.models.config import Architecture
from tokenrelay.runtime.models.decoder import Model
from tokenrelay.runtime.models.fields import Fields
from tokenrelay.runtime.models.registry import architecture_of
from tokenrelay.runtime.placement import Boundary, Mesh, Shard
from tokenrelay.runtime.placement.compiler import compile_model
from tokenrelay.runtime.placement.cost import CostModel
from tokenrelay.runtime.placement.ir import Call, Move, Program, ReduceNorm, Start, moves_of, reads, writes

_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True)
class PlannedMove:
    """One collective of a layer."""

    kind: str
    axes: tuple[str, ...]
    where: str  # the port whose value is moved, without the layer's name
    sent_bytes: float  # by one rank in one step
    seconds: float
    how: str  # "", "fused" into the norm behind it, or "overlapped" with what does not need it


@dataclass(frozen=True)
class Group:
    """Layers that do the same, or what stands before and after them."""

    name: str  # "layers 3-60"
    count: int
    modules: tuple[str, ...]  # in order, "mlp.experts"; a move as "*0" by its index
    moves: tuple[PlannedMove, ...]
    weight_bytes: float  # one rank holds for one layer
    compute_s: float  # predicted for one layer, without reading the cache

    @property
    def sent_bytes(self) -> float:
        """Bytes that one rank sends in one layer and step."""
        return sum(move.sent_bytes for move in self.moves)

    @property
    def move_s(self) -> float:
        """Seconds of the collectives of one layer, overlapped ones too."""
        return sum(move.seconds for move in self.moves)


@dataclass(frozen=True)
class Plan:
    """The whole model."""

    architecture: str
    mesh: Mesh
    cost: CostModel
    groups: tuple[Group, ...]
    compile_s: float  # processor time

    @property
    def step_s(self) -> float:
        """Predicted seconds of one step."""
        return sum(group.count * (group.compute_s + group.move_s) for group in self.groups)


def make_plan(model: Path, mesh: Mesh, cost: CostModel, *, whole_experts: bool = False) -> Plan:
    """The plan for a folder with config.json, or that file. Raises CheckpointError and PlacementError."""
    file = model / "config.json" if model.is_dir() else model
    if not file.exists():
        raise CheckpointError(f"{file} does not exist; a plan needs a model's config.json", file=str(file))
    if cost.tokens < mesh.size("dp"):
        raise PlacementError(f"a step of {cost.tokens} tokens cannot be dealt out to {mesh.size('dp')} ranks of dp")
    name, architecture = architecture_of(Fields.read(file))
    started = time.process_time()
    with torch.device("meta"):
        built = Model(architecture, whole_experts=whole_experts, dtype=torch.bfloat16)
    program = compile_model(built, mesh, cost)
    seconds = time.process_time() - started
    return Plan(name, mesh, cost, _groups(built, architecture, program, cost), seconds)


def _groups(model: Model, architecture: Architecture, program: Program, cost: CostModel) -> tuple[Group, ...]:
    """One entry for each run of neighbouring layers that do the same."""
    buckets: dict[str, list[int]] = {}
    for i, op in enumerate(program.ops):
        name = next(iter([*writes(op), *reads(op)]), "")
        layer = _LAYER.match(name)
        outer = "embedding" if name.startswith("embed") else "head"
        buckets.setdefault(f"layer {layer[1]}" if layer else outer, []).append(i)
    groups: list[Group] = []
    for name, indices in buckets.items():
        group = _group(name, indices, model, architecture, program, cost)
        last = groups[-1] if groups else None
        if last is not None and _same(last, group):
            first = last.name.split()[1].split("-")[0]
            groups[-1] = Group(
                f"layers {first}-{name.split()[1]}",
                last.count + 1,
                last.modules,
                last.moves,
                last.weight_bytes,
                last.compute_s,
            )
        else:
            groups.append(group)
    return tuple(groups)


def _same(a: Group, b: Group) -> bool:
    alike = (a.modules, a.moves, a.weight_bytes, a.compute_s) == (b.modules, b.moves, b.weight_bytes, b.compute_s)
    return alike and a.name.startswith("layer") and b.name.startswith("layer")


def _group(
    name: str, indices: list[int], model: Model, architecture: Architecture, program: Program, cost: CostModel
) -> Group:
    modules: list[str] = []
    moves: list[PlannedMove] = []
    weights = seconds = 0.0
    for i in indices:
        op = program.ops[i]
        for move in moves_of(op):
            how = "fused" if isinstance(op, ReduceNorm) else "overlapped" if isinstance(op, Start) else ""
            modules.append(f"*{len(moves)}")
            moves.append(_planned(move, how, program, cost))
        call = op.call if isinstance(op, ReduceNorm) else op
        if isinstance(call, Call):
            modules.append(_LAYER.sub("", call.module))
            held, took = _work(call, model, architecture, program, cost)
            weights, seconds = weights + held, seconds + took
    return Group(name, 1, tuple(modules), tuple(moves), weights, seconds)


def _planned(move: Move, how: str, program: Program, cost: CostModel) -> PlannedMove:
    source, target = program.values[move.source], program.values[move.target]
    args = (move, source, source.layouts, target.layouts, program.mesh)
    where = _LAYER.sub("", source.name.partition("@")[0])
    return PlannedMove(move.kind, move.axes, where, cost.sent_bytes(*args), cost.move_s(*args), how)


def _work(
    call: Call, model: Model, architecture: Architecture, program: Program, cost: CostModel
) -> tuple[float, float]:
    """(bytes of its weights on one rank, predicted seconds): the larger of reading them and multiplying with them."""
    module = model.get_submodule(call.module)
    if call.module == "head" and architecture.tied:
        module = model.embed
    boundary = module.boundary
    assert isinstance(boundary, Boundary)
    held = touched = 0.0
    for name, layout in boundary.parameters.items():
        tensor = module.get_parameter(name)
        cut = math.prod(program.mesh.size(axis) for axis, placement in layout.items() if isinstance(placement, Shard))
        held += tensor.numel() / cut
    tokens = cost.tokens / (program.mesh.size("dp") if _by_sequence(call, program) else 1)
    multiplied = held * tokens
    touched = held
    if isinstance(module, Experts):
        moe = module.moe
        touched = held * (1 - (1 - 1 / moe.experts) ** (tokens * moe.top_k))  # experts that anybody chose, on average
        multiplied = held * tokens * moe.top_k / moe.experts
    if call.module == "embed":
        touched, multiplied = min(held, tokens * architecture.hidden), 0.0
    reading = touched * cost.element_bytes / cost.memory_bytes_s
    return held * cost.element_bytes, max(reading, 2 * multiplied / cost.flops_s)


def _by_sequence(call: Call, program: Program) -> bool:
    return bool(call.inputs) and program.values[call.inputs[0][1]].layouts[0] == Shard(0)

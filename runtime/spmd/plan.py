"""What a model would do on a mesh: collectives, bytes and predicted time per layer, from config.json alone.

    plan = make_plan(Path("DeepSeek-V3"), Mesh(tp=8, dp=8), CostModel(tokens=64), experts=ExpertSplit(send=True))
    for group in plan.groups: print(group.name, group.move_s)

No weights are read and no device is touched: the model is built on torch's meta device.
"""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from tokenrelay.base.errors import CheckpointError, PlacementError
from tokenrelay.runtime.layers.moe import Experts, ExpertSplit
from tokenrelay.runtime.models.config import Architecture
from tokenrelay.runtime.models.decoder import Model
from tokenrelay.runtime.models.fields import Fields
from tokenrelay.runtime.models.registry import architecture_of
from tokenrelay.runtime.placement import AXES, STAGES, TOKEN_AXES, Boundary, Mesh, Shard
from tokenrelay.runtime.placement.compiler import compile_model
from tokenrelay.runtime.placement.cost import CostModel
from tokenrelay.runtime.placement.ir import Call, Move, Program, ReduceNorm, Start, moves_of, reads, writes
from tokenrelay.runtime.placement.stages import cut_stages

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


def make_plan(model: Path, mesh: Mesh, cost: CostModel, *, experts: ExpertSplit | None = None) -> Plan:
    """The plan for a folder with config.json, or that file. Raises CheckpointError and PlacementError."""
    file = model / "config.json" if model.is_dir() else model
    if not file.exists():
        raise CheckpointError(f"{file} does not exist; a plan needs a model's config.json", file=str(file))
    places = mesh.size("dp") * mesh.size("cp")
    if cost.tokens % places:
        raise PlacementError(f"a step of {cost.tokens} tokens cannot be dealt out to {places} ranks of dp and cp")
    name, architecture = architecture_of(Fields.read(file))
    started = time.process_time()
    with torch.device("meta"):
        built = Model(architecture, experts=experts, dtype=torch.bfloat16)
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
    passed = _cuts(program, architecture.layers)
    for name, indices in buckets.items():
        group = _group(name, indices, model, architecture, program, cost, passed)
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
    name: str,
    indices: list[int],
    model: Model,
    architecture: Architecture,
    program: Program,
    cost: CostModel,
    passed: Mapping[int, tuple[str, ...]],
) -> Group:
    modules: list[str] = []
    moves: list[PlannedMove] = []
    weights = seconds = 0.0
    for i in indices:
        op = program.ops[i]
        if (crossing := passed.get(i)) is not None:
            modules.append(f"*{len(moves)}")
            moves.append(_passed(crossing, program, cost))
        for move in moves_of(op):
            how = "fused" if isinstance(op, ReduceNorm) else "overlapped" if isinstance(op, Start) else ""
            modules.append(f"*{len(moves)}")
            moves.append(_planned(move, how, program, cost))
        call = op.call if isinstance(op, ReduceNorm) else op
        if isinstance(call, Call):
            planned = _exchanged(call, architecture, program, cost) if call.sends else []
            names = [f"*{len(moves) + n}" for n in range(len(planned))]
            moves += planned
            modules += [*names[:2], _LAYER.sub("", call.module), *names[2:]]
            held, took = _work(call, model, architecture, program, cost)
            weights, seconds = weights + held, seconds + took
    return Group(name, 1, tuple(modules), tuple(moves), weights, seconds)


def _planned(move: Move, how: str, program: Program, cost: CostModel) -> PlannedMove:
    source, target = program.values[move.source], program.values[move.target]
    args = (move, source, source.layouts, target.layouts, program.mesh)
    where = _LAYER.sub("", source.name.partition("@")[0])
    return PlannedMove(move.kind, move.axes, where, cost.sent_bytes(*args), cost.move_s(*args), how)


def _exchanged(call: Call, architecture: Architecture, program: Program, cost: CostModel) -> list[PlannedMove]:
    """How many tokens come, the tokens to their experts' ranks, and what these give back."""
    assert architecture.moe is not None
    mesh, where = program.mesh, _LAYER.sub("", call.module)
    there, back = cost.exchanged_bytes(call, program.values, mesh, architecture.moe.top_k)
    ranks = math.prod(mesh.size(axis) for axis in call.sends)
    return [
        PlannedMove("all_to_all", call.sends, f"{where} ({what})", sent, cost.group_s(call.sends, sent, 1, mesh), "")
        for what, sent in (("counts", 8.0 * (ranks - 1)), ("tokens there", there), ("sums back", back))
    ]


def _cuts(program: Program, layers: int) -> dict[int, tuple[str, ...]]:
    """The operations before which a pipeline stage ends, and the values that go on."""
    found, at = {}, 0
    for before, stage in itertools.pairwise(cut_stages(program, layers)):
        at += len(before.ops)
        found[at] = tuple(value for _, value in stage.inputs)
    return found


def _passed(values: tuple[str, ...], program: Program, cost: CostModel) -> PlannedMove:
    """Values sent to the next pipeline stage."""
    mesh = program.mesh
    sent = sum(cost.local_bytes(program.values[v], program.values[v].layouts, mesh) for v in values)
    where = ", ".join(_LAYER.sub("", value) for value in values)
    return PlannedMove("send", (STAGES,), where, sent, cost.group_s((STAGES,), sent, 1, mesh), "")


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
    tokens = cost.tokens / _dealt(call, program)
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


def _dealt(call: Call, program: Program) -> int:
    """Ranks that the tokens of a call are dealt out to; tokens that are sent are in the end those of all."""
    layouts = program.values[call.inputs[0][1]].layouts
    axes = (axis for axis in TOKEN_AXES if axis not in call.sends and layouts[AXES.index(axis)] == Shard(0))
    return math.prod(program.mesh.size(axis) for axis in axes)

"""Runs a compiled program as one rank: the model's signature, its modules in the program's order, moves between.

    rank_model = RankModel(model, programs, comm, rank)
    logits = rank_model(token_ids, batch, caches, sample_rows)       # on all ranks at once; the same on each

Two programs stand by: one for few tokens, where a reduction and the norm behind it are one operation, and one for many,
where tokens are cut around the norms. Each is a list of closures over numbered values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenrelay.base.errors import PlacementError
from tokenrelay.kernels.batch import AttentionBatch
from tokenrelay.runtime.layers.attention import GqaCore
from tokenrelay.runtime.layers.embedding import Embedding, Head
from tokenrelay.runtime.layers.linear import Linear
from tokenrelay.runtime.layers.mla import MlaCore
from tokenrelay.runtime.layers.mlp import Activation
from tokenrelay.runtime.layers.moe import Experts, Router
from tokenrelay.runtime.layers.norm import AddRmsNorm, RmsNorm
from tokenrelay.runtime.models.decoder import Model, SampledRows
from tokenrelay.runtime.placement import Mesh
from tokenrelay.runtime.placement.compiler import compile_model
from tokenrelay.runtime.placement.cost import CostModel
from tokenrelay.runtime.placement.ir import Add, Call, Move, Op, Part, Program, ReduceNorm, Start, reads, writes
from tokenrelay.runtime.placement.passes import SPLIT_TOKENS_MIN
from tokenrelay.runtime.spmd.comm import Comm
from tokenrelay.runtime.spmd.shard import cuts_of


@dataclass(slots=True)
class Inputs:
    """What a step brings beside its tokens."""

    batch: AttentionBatch
    caches: list[Tensor]
    sample_rows: Tensor


Fn = Callable[..., Any]  # (inputs, *values) -> a tensor, or a tuple of them


@dataclass(frozen=True, slots=True)
class Programs:
    """What a rank runs, by the number of tokens."""

    few: Program
    many: Program


def compile_programs(architecture: Any, mesh: Mesh) -> Programs:
    """Both programs for `mesh`. Raises PlacementError, for an axis that ranks do not run too."""
    if mesh.size("dp") > 1:
        raise PlacementError("ranks do not run dp: each of its ranks would need a scheduler of its own")
    with torch.device("meta"):
        model = Model(architecture, dtype=torch.float32)
    ranks = mesh.size("tp")
    # ep keeps its tokens whole: a number of tokens that only tp divides.
    many = CostModel(tokens=ranks * SPLIT_TOKENS_MIN + (ranks if mesh.size("ep") > 1 else 0))
    return Programs(compile_model(model, mesh, CostModel(tokens=1)), compile_model(model, mesh, many))


class RankModel:
    """A model that was loaded for one rank, with the programs of its mesh. Call it on all ranks at once."""

    def __init__(self, model: Model, programs: Programs, comm: Comm, rank: int) -> None:
        self.config = model.config
        self.cos_sin = model.cos_sin
        self._model = model
        self._at = programs.few.mesh.coordinates(rank)
        self._mesh = programs.few.mesh
        self._comm = comm
        for program in (programs.few, programs.many):
            for move in program.moves:
                comm.connect(move.axes)
        self._few = _Line(programs.few, self)
        self._many = _Line(programs.many, self)

    def __call__(self, token_ids: Tensor, batch: AttentionBatch, caches: list[Tensor], sample_rows: Tensor) -> Tensor:
        """As `Model.forward`, whose docstring has the shapes."""
        tokens, tp = token_ids.shape[0], self._mesh.size("tp")
        # The last layer's rows are cut too, so both must divide.
        cut = not tokens % tp and not sample_rows.shape[0] % tp and tokens >= tp * SPLIT_TOKENS_MIN
        line = self._many if cut and sample_rows.shape[0] else self._few
        return line.run(token_ids, Inputs(batch, caches, sample_rows))

    @property
    def shard(self) -> Model:
        """This rank's part of the model. It computes nothing alone."""
        return self._model

    def function(self, op: Op) -> Fn:
        """The closure for `op`; its arguments are what `reads(op)` names."""
        match op:
            case Call():
                return self._call(op.module)
            case Move():
                return lambda inputs, x: self._comm.move(op, x)
            case Start():  # gloo works in its own threads, but a CPU has nothing to spare for it
                return lambda inputs, x: self._comm.move(op.move, x)
            case Part():
                return lambda inputs, x: x[..., op.first : op.end]
            case Add():
                return lambda inputs, x, *more: sum(more, x)
            case ReduceNorm():
                call, move = self._call(op.call.module), op.move
                return lambda inputs, x, residual: call(inputs, self._comm.move(move, x), residual)
            case _:
                raise PlacementError(f"ranks cannot run {op}")

    def _call(self, path: str) -> Fn:
        module = self._model.get_submodule(path)
        match module:
            case AddRmsNorm():
                return lambda inputs, x, residual: module.add(x, residual)
            case RmsNorm() | Linear() | Activation() | Router() | Head():
                return lambda inputs, x: module(x)
            case GqaCore() | MlaCore():
                layer, cos_sin = int(path.split(".")[1]), self.cos_sin
                return lambda inputs, *x: module(*x, cos_sin, inputs.batch, inputs.caches[layer])
            case SampledRows():
                return lambda inputs, x, residual: module(x, residual, inputs.sample_rows)
            case Embedding():
                return self._embedding(module)
            case Experts():
                return self._experts(module)
        raise PlacementError(f"ranks cannot run {path} ({type(module).__name__})")

    def _embedding(self, module: Embedding) -> Fn:
        """Rows of other ranks are zeros: the sum over ranks has each row once."""
        cut = cuts_of(module.boundary.parameters["weight"], 2, self._mesh, self._at)[0]
        rows = module.weight.shape[0]
        first = cut.index * rows

        def embed(inputs: Inputs, token_ids: Tensor) -> Tensor:
            local = token_ids - first
            absent = (local < 0) | (local >= rows)
            found: Tensor = module(local.clamp(0, rows - 1))
            return found.masked_fill_(absent.unsqueeze(-1), 0)

        return embed if cut.count > 1 else lambda inputs, token_ids: module(token_ids)

    def _experts(self, module: Experts) -> Fn:
        """Experts of other ranks are -1, which the kernel passes over."""
        cut = cuts_of(module.boundary.parameters["w_down"], 3, self._mesh, self._at)[0]
        held = module.w_down.shape[0]
        first = cut.index * held

        def feed(inputs: Inputs, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
            local = experts - first
            found: Tensor = module(x, local.masked_fill_((local < 0) | (local >= held), -1), weights)
            return found

        return feed if cut.count > 1 else lambda inputs, x, experts, weights: module(x, experts, weights)


class _Line:
    """A program as closures over numbered values; a value is dropped after its last reader."""

    def __init__(self, program: Program, rank_model: RankModel) -> None:
        numbers: dict[str, int] = {}
        for _, value in program.inputs:
            numbers[value] = len(numbers)
        last: dict[str, int] = {}
        for i, op in enumerate(program.ops):
            last.update(dict.fromkeys(reads(op), i))
        kept = {value for _, value in program.outputs}
        self._steps: list[tuple[Fn, tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = []
        self._attended = 0  # steps before the last layer's rows are chosen: all that a step without samples runs
        for i, op in enumerate(program.ops):
            made = (op.move.target,) if isinstance(op, Start) else writes(op)
            if isinstance(op, Call) and isinstance(rank_model._model.get_submodule(op.module), SampledRows):
                self._attended = len(self._steps)
            if not made or (not isinstance(op, Start) and all(value in numbers for value in made)):
                continue  # a Wait: its Start has made the value
            ins = tuple(numbers[value] for value in reads(op))
            outs = []
            for value in made:
                outs.append(numbers.setdefault(value, len(numbers)))
            dead = tuple(numbers[v] for v in dict.fromkeys(reads(op)) if last[v] == i and v not in kept)
            self._steps.append((rank_model.function(op), ins, tuple(outs), dead))
        self._count = len(numbers)
        self._out = numbers[program.outputs[0][1]]
        self._vocab = rank_model.config.vocab_size

    def run(self, token_ids: Tensor, inputs: Inputs) -> Tensor:
        """The logits [s, vocab]."""
        values: list[Any] = [None] * self._count
        values[0] = token_ids
        sampled = inputs.sample_rows.shape[0]
        for fn, ins, outs, dead in self._steps if sampled else self._steps[: self._attended]:
            made = fn(inputs, *[values[i] for i in ins])
            if len(outs) == 1:
                values[outs[0]] = made
            else:
                for out, value in zip(outs, made, strict=True):
                    values[out] = value
            for i in dead:
                values[i] = None
        if not sampled:
            return torch.empty((0, self._vocab), dtype=torch.float32, device=token_ids.device)
        logits: Tensor = values[self._out]
        return logits

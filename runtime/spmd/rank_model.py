"""Runs a compiled program as one rank: the model's signature, its modules in the program's order, moves between.

    rank_model = RankModel(model, programs, comm, rank)
    logits = rank_model(token_ids, batch, caches, sample_rows)       # on all ranks at once; the same on each

Two programs stand by: one for few tokens, where a reduction and the norm behind it are one operation, and one for many,
where tokens are cut around the norms. Each is one function (line.py).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenrelay.base.errors import PlacementError
from tokenrelay.kernels.batch import AttentionBatch
from tokenrelay.runtime.layers.attention import GqaAttend, GqaCore, GqaHeads
from tokenrelay.runtime.layers.embedding import Embedding, Head
from tokenrelay.runtime.layers.linear import Linear
from tokenrelay.runtime.layers.mla import MlaCore
from tokenrelay.runtime.layers.mlp import Activation
from tokenrelay.runtime.layers.moe import Experts, ExpertSplit, Router
from tokenrelay.runtime.layers.norm import AddRmsNorm, RmsNorm
from tokenrelay.runtime.models.config import Architecture
from tokenrelay.runtime.models.decoder import Model, SampledRows
from tokenrelay.runtime.placement import AXES, STAGES, TOKEN_AXES, Mesh, Shard
from tokenrelay.runtime.placement.compiler import compile_model
from tokenrelay.runtime.placement.cost import CostModel
from tokenrelay.runtime.placement.ir import Add, Call, Move, Op, Part, Program, ReduceNorm, Start, Value
from tokenrelay.runtime.placement.passes import SPLIT_TOKENS_MIN
from tokenrelay.runtime.placement.stages import cut_stages, stage_layers
from tokenrelay.runtime.spmd.balance import Balancer
from tokenrelay.runtime.spmd.comm import Comm
from tokenrelay.runtime.spmd.deal import deal
from tokenrelay.runtime.spmd.homes import Copy
from tokenrelay.runtime.spmd.line import Bound, Line
from tokenrelay.runtime.spmd.mirror import Mirror
from tokenrelay.runtime.spmd.shard import cuts_of


@dataclass(slots=True)
class Inputs:
    """What a step brings beside its tokens."""

    batch: AttentionBatch
    caches: list[Tensor]
    sample_rows: Tensor
    positions: Tensor  # int64 [t]
    keys: tuple[Tensor, Tensor]  # positions and cache slots of the tokens whose keys this rank gets
    real: int  # tokens that are no padding
    cos_sin: Tensor  # the rotation's table

    @property
    def step(self) -> Inputs:
        """Itself, for what takes it whole."""
        return self


Fn = Callable[..., Any]  # values -> a tensor, or a tuple of them


@dataclass(frozen=True, slots=True)
class Programs:
    """What ranks run, by the number of tokens; one program for each pipeline stage."""

    few: tuple[Program, ...]
    many: tuple[Program, ...]

    @property
    def mesh(self) -> Mesh:
        """What they were compiled for."""
        return self.few[0].mesh


def compile_programs(architecture: Architecture, mesh: Mesh, experts: ExpertSplit | None = None) -> Programs:
    """Both programs for `mesh`, in stages. Raises PlacementError."""
    with torch.device("meta"):
        model = Model(architecture, experts=experts, dtype=torch.float32)
    places, tp = mesh.size("dp") * mesh.size("cp"), mesh.size("tp")
    # ep keeps its tokens whole: a number of tokens that only the others divide.
    many = places * (tp * SPLIT_TOKENS_MIN + (tp if mesh.size("ep") > 1 else 0))
    made = [compile_model(model, mesh, CostModel(tokens=tokens)) for tokens in (places, many)]
    return Programs(*(cut_stages(program, architecture.layers) for program in made))


class RankModel:
    """A model that was loaded for one rank, with the programs of its mesh. Call it on all ranks at once."""

    def __init__(
        self,
        model: Model,
        programs: Programs,
        comm: Comm,
        rank: int,
        *,
        shared: bool = False,
        folder: Path | None = None,
    ) -> None:
        """`shared`: the leader keeps the pool as one rank would have it, see `mirror.py`.

        `folder`: the checkpoint, of a model whose experts have spare places, see `balance.py`.
        """
        self.config = model.config
        self.cos_sin = model.cos_sin
        self.mesh = programs.mesh
        self._model = model
        self._at = self.mesh.coordinates(rank)
        self._comm = comm
        self.dealt = self.mesh.size("dp") * self.mesh.size("cp") > 1
        stage, stages = self._at[STAGES], self.mesh.size(STAGES)
        self._stages = stages
        self._first_layer = stage_layers(len(model.layers), stage, stages).start
        few, many = programs.few[stage], programs.many[stage]
        for program in (few, many):
            for axes in _groups(program):
                comm.connect(axes)
        for axis in ("dp", STAGES):  # blocks are copied along dp, values passed on along pp
            if self.mesh.size(axis) > 1:
                comm.connect((axis,))
        self.balancer = Balancer(model, comm, self.mesh, rank, folder) if folder is not None else None
        self.mirror = Mirror(comm, self.mesh, rank, model.config.kv_layout) if shared else None
        self._few = Line(few, self.bind, fused=not self.dealt)
        self._many = Line(many, self.bind, fused=not self.dealt)

    def __call__(
        self,
        token_ids: Tensor,
        batch: AttentionBatch,
        caches: list[Tensor],
        sample_rows: Tensor,
        homes: Sequence[int] = (),
        copies: Sequence[Copy] = (),
    ) -> Tensor:
        """As `Model.forward`, whose docstring has the shapes. With dp each row has its home, and blocks are copied.

        The first rank returns the logits, and the others something of no meaning.
        """
        self._copy(caches, copies)
        order = None
        keys = (batch.positions, batch.cache_slots)
        inputs = Inputs(batch, caches, sample_rows, batch.positions, keys, token_ids.shape[0], self.cos_sin)
        if self.dealt:
            dealt = deal(token_ids, batch, sample_rows, homes or [0] * len(batch.starts), self.mesh, self._at)
            token_ids, order = dealt.token_ids, dealt.order
            real = len(dealt.batch.positions)
            inputs = Inputs(dealt.batch, caches, dealt.sample_rows, dealt.positions, dealt.keys, real, self.cos_sin)
        tokens, tp, sampled = token_ids.shape[0], self.mesh.size("tp"), inputs.sample_rows.shape[0]
        # The last layer's rows are cut too, so both must divide.
        cut = not tokens % tp and not sampled % tp and tokens >= tp * SPLIT_TOKENS_MIN
        line = self._many if cut and sampled else self._few
        logits = self._whole(line, token_ids, inputs) if self._stages == 1 else self._staged(line, token_ids, inputs)
        return logits[order] if order is not None and len(logits) else logits

    @property
    def shard(self) -> Model:
        """This rank's part of the model. It computes nothing alone."""
        return self._model

    # -- dp and pp ----------------------------------------------------------------------------------------------------
    def _copy(self, caches: list[Tensor], copies: Sequence[Copy]) -> None:
        """Blocks that a row's home lacks, along dp; each rank for its layers and heads."""
        place = self._at["dp"]
        for copy in copies:
            blocks = torch.tensor(copy.blocks)
            if place == copy.source:
                self._comm.send("dp", copy.target, torch.stack([cache[blocks] for cache in caches]))
            elif place == copy.target:
                like = torch.empty((len(caches), len(blocks), *caches[0].shape[1:]), dtype=caches[0].dtype)
                for cache, filled in zip(caches, self._comm.receive("dp", copy.source, like), strict=True):
                    cache[blocks] = filled

    def _whole(self, line: Line, token_ids: Tensor, inputs: Inputs) -> Tensor:
        """All layers. A step without samples ends at the last layer's attention."""
        made = line.run(token_ids, inputs)
        if made is None:
            return torch.empty((0, self.config.vocab_size), dtype=torch.float32, device=token_ids.device)
        logits: Tensor = made[0]
        return logits

    def _staged(self, line: Line, token_ids: Tensor, inputs: Inputs) -> Tensor:
        """This stage's part: values from the stage before, values to the one behind, and logits back to rank 0."""
        stage, last = self._at[STAGES], self.mesh.size(STAGES) - 1
        if stage == 0:
            given = [token_ids]
        else:
            dtype, tokens = self.config.dtype, token_ids.shape[0]
            likes = [torch.empty(_local(value, self.mesh, tokens), dtype=dtype) for value in line.takes]
            given = [self._comm.receive(STAGES, stage - 1, like) for like in likes]
        made = line.run(*given, inputs)
        if stage < last:
            assert made is not None
            for value in made:
                self._comm.send(STAGES, stage + 1, value)
        leads = not any(place for axis, place in self._at.items() if axis != STAGES)
        sampled, vocab = inputs.sample_rows.shape[0], self.config.vocab_size
        if not leads or not sampled or 0 < stage < last:
            return torch.empty((0, vocab))
        if stage == last:
            assert made is not None
            logits: Tensor = made[0]
            self._comm.send(STAGES, 0, logits)
            return logits
        places = self.mesh.size("dp") * self.mesh.size("cp")
        return self._comm.receive(STAGES, last, torch.empty((places * sampled, vocab)))

    # -- a program's operations ---------------------------------------------------------------------------------------
    def bind(self, op: Op) -> Bound:
        """What runs `op`; its values are what `reads(op)` names."""
        match op:
            case Call():
                return self._call(op.module, op.sends)
            case Move():
                return Bound(self._comm.mover(op))
            case Start():  # gloo works in its own threads, but a CPU has nothing to spare for it
                return Bound(self._comm.mover(op.move))
            case Part():
                return Bound(lambda x: x[..., op.first : op.end])
            case Add():
                return Bound(operator.add if len(op.sources) == 2 else lambda x, *more: sum(more, x))
            case ReduceNorm():
                return replace(self._call(op.call.module), first=self._comm.mover(op.move))
            case _:
                raise PlacementError(f"ranks cannot run {op}")

    def _call(self, path: str, sends: tuple[str, ...] = ()) -> Bound:
        module = self._model.get_submodule(path)
        match module:
            case AddRmsNorm():
                return Bound(module.add)
            case RmsNorm() | Linear() | Activation() | Router() | Head():
                return Bound(module.forward)
            case GqaHeads() | GqaAttend() | GqaCore() | MlaCore():
                layer = int(path.split(".")[1]) - self._first_layer
                return self._attention_apart(module, layer) if self.dealt else self._attention(module, layer)
            case SampledRows():
                return Bound(module.forward, ("sample_rows",), ends=True)
            case Embedding():
                return Bound(self._embedding(module))
            case Experts():
                if self.balancer is not None:
                    return Bound(self._placed(module, int(path.split(".")[1]), sends, self.balancer), ("step",))
                return Bound(self._sent(module, sends) if sends else self._experts(module))
        raise PlacementError(f"ranks cannot run {path} ({type(module).__name__})")

    def _attention(self, module: GqaHeads | GqaAttend | GqaCore | MlaCore, layer: int) -> Bound:
        match module:
            case GqaHeads():
                return Bound(module.forward, ("cos_sin", "positions"))
            case GqaAttend():
                return Bound(module.forward, ("batch", f"caches[{layer}]", "keys[1]"))
        return Bound(module.forward, ("cos_sin", "batch", f"caches[{layer}]"))

    def _attention_apart(self, module: GqaHeads | GqaAttend | GqaCore | MlaCore, layer: int) -> Bound:
        """Where keys may be of other tokens than the queries, and some tokens are padding, which never attends."""

        def padded(y: Tensor, tokens: int) -> Tensor:
            return y if y.shape[0] == tokens else F.pad(y, (0, 0, 0, tokens - y.shape[0]))

        def attend(q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
            assert isinstance(module, GqaAttend)
            cache, slots = inputs.caches[layer], inputs.keys[1]
            return padded(module(q[: inputs.real], k, v, inputs.batch, cache, slots), q.shape[0])

        def attend_latents(q: Tensor, latent: Tensor, k_rope: Tensor, inputs: Inputs) -> Tensor:
            assert isinstance(module, MlaCore)
            given = (q[: inputs.real], latent, k_rope, inputs.cos_sin, inputs.batch, inputs.caches[layer], inputs.keys)
            return padded(module.apart(*given), q.shape[0])

        match module:
            case GqaHeads():
                return Bound(module.forward, ("cos_sin", "positions"))
            case GqaAttend():
                return Bound(attend, ("step",))
        return Bound(attend_latents, ("step",))

    def _embedding(self, module: Embedding) -> Fn:
        """Rows of other ranks are zeros: the sum over ranks has each row once."""
        cut = cuts_of(module.boundary.parameters["weight"], 2, self.mesh, self._at)[0]
        rows = module.weight.shape[0]
        first = cut.index * rows

        def embed(token_ids: Tensor) -> Tensor:
            local = token_ids - first
            absent = (local < 0) | (local >= rows)
            found: Tensor = module(local.clamp(0, rows - 1))
            return found.masked_fill_(absent.unsqueeze(-1), 0)

        return embed if cut.count > 1 else module.forward

    def _experts(self, module: Experts) -> Fn:
        """Experts of other ranks are -1, which the kernel passes over."""
        cut = cuts_of(module.boundary.parameters["w_down"], 3, self.mesh, self._at)[0]
        held = module.w_down.shape[0]
        first = cut.index * held

        def feed(x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
            local = experts - first
            found: Tensor = module(x, local.masked_fill_((local < 0) | (local >= held), -1), weights)
            return found

        return feed if cut.count > 1 else module.forward

    def _sent(self, module: Experts, axes: tuple[str, ...]) -> Fn:
        """Tokens go to the ranks along `axes` that hold their experts."""
        held, firsts = module.w_down.shape[0], self._firsts(module, axes)

        def feed(x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
            return self._comm.exchange(axes, x, experts, weights, firsts=firsts, held=held, work=module)

        return feed

    def _firsts(self, module: Experts, axes: tuple[str, ...]) -> list[int]:
        """The first expert, or place of one, of each rank along `axes`."""
        held, layout = module.w_down.shape[0], module.boundary.parameters["w_down"]
        group = next(g for g in self.mesh.groups(axes) if self.mesh.rank_at(self._at) in g)
        return [cuts_of(layout, 3, self.mesh, self.mesh.coordinates(rank))[0].index * held for rank in group]

    def _placed(self, module: Experts, layer: int, sends: tuple[str, ...], balancer: Balancer) -> Fn:
        """Experts that move: choices are counted, and become places."""
        held = module.w_down.shape[0]
        first = cuts_of(module.boundary.parameters["w_down"], 3, self.mesh, self._at)[0].index * held
        firsts = self._firsts(module, sends) if sends else []
        gathered = not sends and self.mesh.size("dp") > 1

        def feed(x: Tensor, experts: Tensor, weights: Tensor, inputs: Inputs) -> Tensor:
            balancer.count(layer, experts, inputs.real, gathered=gathered)
            places = balancer.places(layer, experts)
            if sends:
                return self._comm.exchange(sends, x, places, weights, firsts=firsts, held=held, work=module)
            local = places - first
            found: Tensor = module(x, local.masked_fill_((local < 0) | (local >= held), -1), weights)
            return found

        return feed


def _groups(program: Program) -> Iterator[tuple[str, ...]]:
    for move in program.moves:
        yield move.axes
    for op in program.ops:
        if isinstance(op, Call) and op.sends:
            yield op.sends


def _local(value: Value, mesh: Mesh, tokens: int) -> list[int]:
    """The shape that a rank holds of `value` in a step of which it has `tokens`."""
    shape = [tokens if size is None else size for size in value.shape]
    for axis, placement in zip(AXES, value.layouts, strict=True):
        if isinstance(placement, Shard) and not (value.shape[placement.dim] is None and axis in TOKEN_AXES):
            shape[placement.dim] //= mesh.size(axis)
    return shape

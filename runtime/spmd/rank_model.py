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
from tokenrelay.runtime.spmd.frames import on_device
from tokenrelay.runtime.spmd.homes import at_home, homes_of
from tokenrelay.runtime.spmd.line import Bound, Line
from tokenrelay.runtime.spmd.micro import MICRO_TOKENS_MIN, count_batches, cut_step
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


@dataclass(frozen=True, slots=True)
class Work:
    """What a rank computes: a program, its tokens, and the rest that it reads."""

    line: Line
    token_ids: Tensor  # int64 [t]
    inputs: Inputs
    order: Tensor | None  # int64: where among the gathered logits each sampled row stands; None: in place

    def in_order(self, logits: Tensor) -> Tensor:
        """Gathered logits as the step's sampled rows stand."""
        return logits if self.order is None or not len(logits) else logits[self.order]


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
        overlapped: bool = False,
    ) -> None:
        """`shared`: the leader keeps the pool as one rank would have it, see `mirror.py`.

        `folder`: the checkpoint, of a model whose experts have spare places, see `balance.py`. `overlapped`: what a
        program begins early is waited for late also on a CPU.
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
        if stages > 1:
            comm.connect((STAGES,))  # values are passed on
        self.part_blocks = 0  # of this rank's caches
        self.micro_tokens_min = MICRO_TOKENS_MIN  # of a micro-batch
        self.balancer = Balancer(model, comm, self.mesh, rank, folder) if folder is not None else None
        layers = len(model.layers)
        self.mirror = Mirror(comm, self.mesh, rank, model.config.kv_layout, layers) if shared else None
        # gloo works in its own threads, but a CPU has nothing to spare for it.
        self._overlapped = overlapped or self.cos_sin.is_cuda
        self._few, self._many = (
            Line(program, self.bind, fused=not self.dealt, overlapped=self._overlapped) for program in (few, many)
        )

    def allocate(self, blocks: int) -> int:
        """The blocks of this rank's caches, for a pool of so many: its part of it, along dp."""
        self.part_blocks = blocks // self.mesh.size("dp")
        return self.part_blocks

    def __call__(self, token_ids: Tensor, batch: AttentionBatch, caches: list[Tensor], sample_rows: Tensor) -> Tensor:
        """As `Model.forward`, whose docstring has the shapes; on the CPU where tokens or layers are dealt out.

        The first rank returns the logits, and the others something of no meaning.
        """
        homes = [0] * len(batch.starts)
        if self.mesh.size("dp") > 1:
            homes = homes_of(batch, self.part_blocks)
            batch = at_home(batch, self._at["dp"], self.part_blocks, self.config.kv_layout.block_tokens)
        if self._stages > 1:
            return self._staged(token_ids, batch, caches, sample_rows, homes)
        work = self._work(token_ids, batch, caches, sample_rows, homes)
        made = work.line.run(work.token_ids, work.inputs)
        if made is None:  # a step without samples ends at the last layer's attention
            return torch.empty((0, self.config.vocab_size), dtype=torch.float32, device=self.cos_sin.device)
        return work.in_order(made[0])

    @property
    def shard(self) -> Model:
        """This rank's part of the model. It computes nothing alone."""
        return self._model

    def _work(
        self, token_ids: Tensor, batch: AttentionBatch, caches: list[Tensor], sample_rows: Tensor, homes: Sequence[int]
    ) -> Work:
        """What this rank computes of a step, or of a part of one."""
        order, device = None, self.cos_sin.device
        if self.dealt:
            dealt = deal(token_ids, batch, sample_rows, homes, self.mesh, self._at)
            real, order = len(dealt.batch.positions), dealt.order.to(device)
            token_ids, batch, sample_rows = on_device(dealt.token_ids, dealt.batch, dealt.sample_rows, device)
            positions, keys = dealt.positions.to(device), (dealt.keys[0].to(device), dealt.keys[1].to(device))
        else:
            token_ids, batch, sample_rows = on_device(token_ids, batch, sample_rows, device)
            positions, keys, real = batch.positions, (batch.positions, batch.cache_slots), token_ids.shape[0]
        inputs = Inputs(batch, caches, sample_rows, positions, keys, real, self.cos_sin)
        tokens, tp, sampled = token_ids.shape[0], self.mesh.size("tp"), sample_rows.shape[0]
        # The last layer's rows are cut too, so both must divide.
        cut = not tokens % tp and not sampled % tp and tokens >= tp * SPLIT_TOKENS_MIN
        return Work(self._many if cut and sampled else self._few, token_ids, inputs, order)

    # -- pp -----------------------------------------------------------------------------------------------------------
    def _staged(
        self, token_ids: Tensor, batch: AttentionBatch, caches: list[Tensor], sample_rows: Tensor, homes: Sequence[int]
    ) -> Tensor:
        """This stage's part of each micro-batch: values come from the stage before, and go to the one behind.

        Nobody waits for a value to arrive before it goes on with the next micro-batch. The logits go to rank 0 when all
        are there, so that no message stands in the way of one that somebody waits for.
        """
        stage, last = self._at[STAGES], self._stages - 1
        places = self.mesh.size("dp") * self.mesh.size("cp")
        count = count_batches(len(token_ids), places, self._stages, self.micro_tokens_min)
        parts = cut_step(token_ids, batch, sample_rows, homes, count)
        leads = not any(place for axis, place in self._at.items() if axis != STAGES)
        works, logits, sends = list[Work](), list[Tensor](), list[Callable[[], None]]()
        for part in parts:
            work = self._work(part.token_ids, part.batch, caches, part.sample_rows, part.homes)
            works.append(work)
            made = work.line.run(*self._given(work, stage), work.inputs)
            if stage < last:
                assert made is not None
                sends += [self._comm.begin_send(STAGES, stage + 1, value) for value in made]
            elif made is not None:
                logits.append(made[0])
        for wait in sends:
            wait()
        vocab, sampled = self.config.vocab_size, [work.inputs.sample_rows.shape[0] * places for work in works]
        if not leads or not len(sample_rows) or 0 < stage < last:
            return torch.empty((0, vocab))
        if stage == last:
            self._comm.send(STAGES, 0, found := torch.cat(logits))
            return found
        came = self._comm.receive(STAGES, last, torch.empty((sum(sampled), vocab), device=self.cos_sin.device))
        found = torch.empty((len(sample_rows), vocab), device=came.device)
        for part, work, rows in zip(parts, works, torch.split(came, sampled), strict=True):
            found[part.sampled.to(came.device)] = work.in_order(rows)
        return found

    def _given(self, work: Work, stage: int) -> list[Tensor]:
        """What the line takes: the tokens in the first stage, values of the one before in the others."""
        if stage == 0:
            return [work.token_ids]
        tokens, dtype, device = work.token_ids.shape[0], self.config.dtype, self.cos_sin.device
        likes = [torch.empty(_local(v, self.mesh, tokens), dtype=dtype, device=device) for v in work.line.takes]
        return [self._comm.receive(STAGES, stage - 1, like) for like in likes]

    # -- a program's operations ---------------------------------------------------------------------------------------
    def bind(self, op: Op) -> Bound:
        """What runs `op`; its values are what `reads(op)` names."""
        match op:
            case Call():
                return self._call(op.module, op.sends)
            case Move():
                return Bound(self._comm.mover(op))
            case Start():
                return Bound(self._comm.beginner(op.move) if self._overlapped else self._comm.mover(op.move))
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

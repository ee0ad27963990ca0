"""A model's layers as one native program, where every operation of theirs has a native CPU kernel.

    model.capture()        # after weights are final; build_engine does

The program is made anew when the registry's choice may have changed; where it cannot be made, the modules run one by
one. Both compute the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from tokenrelay.base.logging import get_logger
from tokenrelay.kernels import registry
from tokenrelay.kernels.batch import AttentionBatch
from tokenrelay.kernels.layout import MlaLayout
from tokenrelay.kernels.program import AnyWeight, MlaShape, NotNative, Program, RouteShape, Side
from tokenrelay.runtime.layers.attention import GqaAttention, GqaHeads
from tokenrelay.runtime.layers.embedding import Head
from tokenrelay.runtime.layers.linear import Linear
from tokenrelay.runtime.layers.mla import MlaAttention
from tokenrelay.runtime.layers.mlp import SwiGlu
from tokenrelay.runtime.layers.moe import MoeMlp

if TYPE_CHECKING:
    from tokenrelay.runtime.models.decoder import DecoderLayer, Model

log = get_logger("models")


class Capture:
    """The program of one model, or none."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._generation = -1
        self._programs: dict[bool, Program | None] = {}  # made when they are first asked for

    def program(self, *, hidden: bool = False) -> Program | None:
        """None: there is none, run the modules. `hidden`: of `Model.hidden`, else of `Model.forward`."""
        if self._generation != registry.generation():
            registry.load()  # registers kernels, which counts
            self._generation = registry.generation()
            self._programs.clear()
        if hidden not in self._programs:
            try:
                self._programs[hidden] = _Emitter(self._model, every=hidden).emit()
            except NotNative as reason:
                log.info("the model runs operation by operation", reason=str(reason))
                self._programs[hidden] = None
        return self._programs[hidden]

    def run(self, token_ids: Tensor, batch: AttentionBatch, caches: list[Tensor], sample_rows: Tensor) -> Tensor | None:
        """The logits, or None where there is no program, or none for this step."""
        program = self.program()
        if program is None or not program.takes(batch):
            return None
        return program.run(token_ids, batch, caches, sample_rows)

    def hidden(self, token_ids: Tensor, batch: AttentionBatch, caches: list[Tensor]) -> Tensor | None:
        """What stands behind every token, or None, as in `run`."""
        program = self.program(hidden=True)
        if program is None or not program.takes(batch):
            return None
        return program.hidden(token_ids, batch, caches, self._model.architecture.hidden)


class _Emitter:
    """Walks a model's modules in the order in which they run."""

    def __init__(self, model: Model, *, every: bool) -> None:
        """`every`: up to what the head multiplies, for every token; else logits of the sampled ones."""
        self._model = model
        self._every = every
        self._dtype = model.config.dtype
        self._program = Program(dtype=self._dtype, cos_sin=model.cos_sin)
        self._block_tokens = model.config.kv_layout.block_tokens
        hidden = model.architecture.hidden
        self._hidden = hidden
        self._x, self._normed, self._residual = (self._program.buffer(hidden) for _ in range(3))
        self._buffers: dict[tuple[str, int], int] = {}

    def emit(self) -> Program:
        """The whole program. Raises NotNative."""
        model, program = self._model, self._program
        program.embed(model.embed.weight, self._residual)
        for i, layer in enumerate(model.layers):
            self._layer(i, layer)  # type: ignore[arg-type]
        last = Program.LOGITS if self._every else self._normed
        program.norm(self._x, model.norm.weight, model.norm.eps, last, self._residual)
        if not self._every:
            program.linear(self._normed, _weight_of(model.head), None, Program.LOGITS)
        return program

    def _layer(self, index: int, layer: DecoderLayer) -> None:
        program, norm = self._program, layer.input_norm
        if index == 0:
            program.norm(self._residual, norm.weight, norm.eps, self._normed)
        else:
            program.norm(self._x, norm.weight, norm.eps, self._normed, self._residual)
        last = layer.rows is not None and not self._every
        if isinstance(layer.attention, MlaAttention):
            self._mla(layer.attention, last=last)
        elif isinstance(layer.attention, GqaAttention):
            self._gqa(layer.attention, last=last)
        else:
            raise NotNative(f"no program for {type(layer.attention).__name__}")
        program.norm(self._x, layer.post_norm.weight, layer.post_norm.eps, self._normed, self._residual)
        if isinstance(layer.mlp, MoeMlp):
            self._moe(layer.mlp)
        elif isinstance(layer.mlp, SwiGlu):
            self._mlp(layer.mlp)
        else:
            raise NotNative(f"no program for {type(layer.mlp).__name__}")

    def _take(self, buffer: int, width: int) -> int:
        """From here on only the sampled tokens, of the residual stream and of this buffer -> where that is then."""
        taken, residual = self._buffer("taken", width), self._buffer("residual", self._hidden)
        self._program.take([(buffer, taken, width), (self._residual, residual, self._hidden)])
        self._residual = residual
        return taken

    def _gqa(self, attention: GqaAttention, *, last: bool) -> None:
        """`last`: once its keys are written, a layer whose other tokens nobody reads."""
        core = attention.core
        part = core.heads
        assert isinstance(part, GqaHeads)
        heads, kv_heads, _ = part.split
        width = heads * part.head_dim
        qkv_width = width + 2 * kv_heads * part.head_dim
        qkv = self._buffer("qkv", qkv_width)
        q, attended = self._buffer("q", width), self._buffer("attended", width)
        self._linear(self._normed, attention.qkv, qkv)
        norms, eps = None, 0.0
        if part.q_norm is not None and part.k_norm is not None:
            norms, eps = (part.q_norm.weight, part.k_norm.weight), part.q_norm.eps
        shape = (heads, kv_heads, part.head_dim)
        numbers = (shape, norms, eps, part.head_dim**-0.5, self._block_tokens, q, attended)
        if last:
            self._program.gqa(qkv, *numbers, Side.KEYS)
            qkv = self._take(qkv, qkv_width)
        self._program.gqa(qkv, *numbers, Side.QUERIES if last else Side.BOTH)
        self._linear(attended, attention.out, self._x)

    def _mla(self, attention: MlaAttention, *, last: bool) -> None:
        """See `_gqa`."""
        program, core = self._program, attention.core
        mla, (q_rank, rank, rope) = core.mla, attention.split
        if not isinstance(self._model.config.kv_layout, MlaLayout):
            raise NotNative(f"no program for a cache of {type(self._model.config.kv_layout).__name__}")
        width = q_rank + rank + rope
        down, latent = self._buffer("down", width), self._buffer("latent", rank)
        q, attended = self._buffer("q", core.heads * (mla.nope + rope)), self._buffer("attended", core.out_width)
        self._linear(self._normed, attention.down, down)
        program.norm(down, attention.kv_norm.weight, attention.kv_norm.eps, latent, part=(q_rank, width))
        shape = MlaShape(core.heads, mla.nope, rope, rank, mla.v, width, q_rank + rank, core.interleaved, core.scale)
        weights = (core.w_uk, core.w_uv, core.packed)
        numbers = (shape, weights, self._block_tokens, (q, latent, down), attended)
        queries = self._normed if attention.q_norm is None else down
        if last:
            program.mla(*numbers, Side.KEYS)
            queries = self._take(queries, self._hidden if attention.q_norm is None else width)
        if attention.q_norm is not None:
            compressed = self._buffer("q_compressed", q_rank)
            program.norm(queries, attention.q_norm.weight, attention.q_norm.eps, compressed, part=(0, width))
            queries = compressed
        self._linear(queries, attention.q_up, q)
        program.mla(*numbers, Side.QUERIES if last else Side.BOTH)
        self._linear(attended, attention.out, self._x)

    def _moe(self, mlp: MoeMlp) -> None:
        program, moe, experts = self._program, mlp.router.moe, mlp.experts
        shape = RouteShape(
            moe.experts,
            moe.top_k,
            moe.groups,
            moe.groups_top_k,
            moe.scoring == "sigmoid",
            moe.normalize,
            moe.group_score == "top2",
            moe.scale,
        )
        routed = program.route(self._normed, mlp.router.weight, mlp.router.bias, shape)
        out = self._x if mlp.shared is None else self._buffer("routed", self._hidden)
        gate_up, down = experts.packed or experts.quantized or (experts.w_gate_up, experts.w_down)
        program.experts(self._normed, routed, moe.top_k, gate_up, down, out)
        if mlp.shared is not None:
            self._mlp(mlp.shared)
            program.add(out, self._x, self._hidden, self._x)

    def _mlp(self, mlp: SwiGlu) -> None:
        width = mlp.down.width
        gate_up, hidden = self._buffer("gate_up", 2 * width), self._buffer("hidden", width)
        self._linear(self._normed, mlp.gate_up, gate_up)
        self._program.silu_mul(gate_up, width, hidden)
        self._linear(hidden, mlp.down, self._x)

    def _linear(self, x: int, linear: Linear, out: int) -> None:
        self._program.linear(x, _weight_of(linear), linear.bias, out)

    def _buffer(self, name: str, width: int) -> int:
        """One for all layers."""
        key = (name, width)
        if key not in self._buffers:
            self._buffers[key] = self._program.buffer(width)
        return self._buffers[key]


def _weight_of(module: Linear | Head) -> AnyWeight:
    if module.packed is not None:
        return module.packed
    if module.quantized is not None:
        return module.quantized
    return module.table if isinstance(module, Head) else module.weight

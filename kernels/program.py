"""A model's step on the CPU as one call: its operations captured once, run without Python between them.

    program = Program(dtype=torch.bfloat16, cos_sin=table)
    x = program.embed(embedding)
    ...
    logits = program.run(token_ids, batch, caches, sample_rows)

Every operation is chosen by the registry, as `ops` chooses it; where that is no native CPU kernel, NotNative is raised
and the model runs op by op. The same functions are called, so results are equal bit by bit.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenrelay.kernels import registry
from tokenrelay.kernels.batch import AttentionBatch
from tokenrelay.kernels.layout import ABSORBED_TOKENS, absorbed_tokens_max
from tokenrelay.kernels.packed import PackedHeads, PackedWeight
from tokenrelay.kernels.quantized import QuantizedWeight

if TYPE_CHECKING:
    from tokenrelay.kernels._cpu import NativeMatrix

AnyWeight = Tensor | QuantizedWeight | PackedWeight
# Prompt tokens of a step beyond which the room that latent attention's absorbed queries take (heads * rank elements a
# token, twice) is no longer worth the microseconds that a captured step saves.
_MLA_PROMPT_TOKENS_MAX = 256
_NOTHING = (16, 0, 0, 0, 0, 0)  # a packed weight of no columns
_CODES = {torch.float32: 0, torch.bfloat16: 1}
_VARIANTS = {"cpu/baseline": 0, "cpu/avx2": 1, "cpu/avx512": 2, "cpu/avx512bf16": 3, "cpu/avx512vnni": 2}


class NotNative(Exception):
    """An operation that no native CPU kernel is chosen for."""


class Side(enum.IntEnum):
    """What of a layer's attention runs. The last layer's queries come after `take`: nobody reads what the other tokens
    would attend to.
    """

    BOTH = 0
    KEYS = 1  # their rotation and cache write alone
    QUERIES = 2  # of the sampled tokens, once the keys are written


@dataclass(frozen=True, slots=True)
class MlaShape:
    """A layer of latent attention: widths by head but for the rank, and how its down-projection's row is cut."""

    heads: int
    nope: int
    rope: int
    rank: int
    value: int
    down_width: int
    rope_at: int  # element of that row at which the key's part to rotate begins
    interleaved: bool
    scale: float


@dataclass(frozen=True, slots=True)
class RouteShape:
    """How experts are chosen; see `ops.moe_route`."""

    experts: int
    top_k: int
    groups: int
    groups_top_k: int
    sigmoid: bool
    normalize: bool
    top2: bool
    scale: float


class Program:
    """Buffers are numbers; each holds a row for each token, which is dropped when the step is over."""

    LOGITS = -1  # the buffer of the result

    def __init__(self, *, dtype: torch.dtype, cos_sin: Tensor) -> None:
        """`cos_sin` f32 [positions, rotated width]."""
        if dtype not in _CODES or not cos_sin.is_cpu:
            raise NotNative(f"{dtype} on {cos_sin.device}")
        try:
            import tokenrelay.kernels._cpu as native
        except ImportError as error:
            raise NotNative(str(error)) from error
        self.native = native.Program(cos_sin.shape[0])
        self._dtype = dtype
        self._code = _CODES[dtype]
        self._cos_sin = cos_sin
        self._kept: list[object] = [cos_sin]  # what the program holds addresses of
        self._shared: dict[tuple[str, int], int] = {}
        self.vocab = 0  # columns of the logits
        self.sampler: int | None = None  # variant that chooses tokens from them; None: no native one
        self._layers = 0
        # Tokens of a prompt's chunk that latent attention absorbs, by where it begins; None: there is none.
        self._absorbs: Callable[[int], int] | None = None

    @property
    def layers(self) -> int:
        """That have a cache."""
        return self._layers

    def buffer(self, width: int, dtype: torch.dtype | None = None) -> int:
        """Room for `width` elements of each token."""
        return self.native.buffer(width * (dtype or self._dtype).itemsize)

    def embed(self, table: Tensor, out: int) -> None:
        """Rows of `table` [vocab, d] by token id."""
        vocab, width = table.shape
        self.native.embed(self._code, vocab, width, self._address(table), out)

    def norm(
        self,
        x: int,
        weight: Tensor,
        eps: float,
        out: int,
        residual: int = -1,
        part: tuple[int, int] | None = None,
    ) -> None:
        """As `ops.rms_norm`, or with `residual` as `ops.add_rms_norm`, the sum taking its place.

        `part`: x's rows are wider: where the elements begin, and how wide they are.
        """
        op = "rms_norm" if residual < 0 else "add_rms_norm"
        width = weight.shape[0]
        isa = self._chosen(op, self._dtype, width=width)
        at, x_width = part or (0, width)
        self.native.norm(isa, self._code, width, x, at, x_width, residual, self._address(weight), eps, out)

    def linear(self, x: int, weight: AnyWeight, bias: Tensor | None, out: int) -> None:
        """As `ops.linear` and its kin; into LOGITS in float32."""
        matrix, columns = self._matrix(weight)
        wide = out == self.LOGITS
        if wide:
            self.vocab, self.sampler = columns, self._sampler_of(columns)
        self.native.linear(
            self._code, 0 if wide else self._code, matrix, x, 0 if bias is None else self._address(bias), out
        )

    def silu_mul(self, x: int, width: int, out: int) -> None:
        """As `ops.silu_mul`: 2 * `width` elements -> `width`."""
        self.native.silu_mul(self._chosen("silu_mul", self._dtype, width=2 * width), self._code, width, x, out)

    def gqa(
        self,
        qkv: int,
        heads: tuple[int, int, int],
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
        scale: float,
        block_tokens: int,
        q: int,
        out: int,
        side: Side = Side.BOTH,
    ) -> None:
        """Norms, rotation, cache write and attention of the next layer; `heads`: query heads, KV heads, head_dim."""
        count, kv_heads, head_dim = heads
        sizes = {"heads": count, "kv_heads": kv_heads, "head_dim": head_dim, "block_tokens": block_tokens}
        decode = self._chosen("gqa_decode", self._dtype, **sizes)
        prefill = self._chosen("gqa_prefill", self._dtype, **sizes)
        rotary = self._chosen("rotary", self._dtype, rope=head_dim)
        norm = rotary if norms is None else self._chosen("rms_norm", self._dtype, width=head_dim)
        self._chosen("gqa_cache_write", self._dtype, kv_heads=kv_heads, head_dim=head_dim)
        self._apart("gqa_rotary_write", heads=count, kv_heads=kv_heads, head_dim=head_dim)
        if self._cos_sin.shape[1] != head_dim:
            raise NotNative("a part of each head is rotated")
        q_norm, k_norm = (0, 0) if norms is None else (self._address(norms[0]), self._address(norms[1]))
        self.native.gqa(
            (norm, rotary, decode, prefill),
            self._code,
            count,
            kv_heads,
            head_dim,
            q_norm,
            k_norm,
            eps,
            scale,
            self._cos_sin.data_ptr(),
            self._layers,
            side,
            qkv,
            q,
            out,
        )
        self._layers += side is not Side.KEYS

    def mla(
        self,
        shape: MlaShape,
        weights: tuple[Tensor, Tensor, PackedHeads | None],
        block_tokens: int,
        inputs: tuple[int, int, int],
        out: int,
        side: Side = Side.BOTH,
    ) -> None:
        """Rotation, cache write, attention and values of the next layer. `weights`: w_uk, w_uv, both packed.

        `inputs`: buffers of the queries, the normed latents and the down-projection.
        """
        heads, rank, rope = shape.heads, shape.rank, shape.rope
        sizes = {"heads": heads, "rank": rank, "rope": rope, "block_tokens": block_tokens}
        prefill = self._kernel("mla_prefill", self._dtype, **sizes, nope=shape.nope, value=shape.value)
        variants = (
            self._chosen("rotary", self._dtype, rope=rope),
            self._chosen("mla_absorb", self._dtype, heads=heads, nope=shape.nope, rank=rank),
            self._chosen("mla_decode", self._dtype, **sizes),
            self._chosen("mla_expand", self._dtype, heads=heads, value=shape.value, rank=rank),
            _VARIANTS[prefill.removesuffix("/absorbed")],
        )
        self._chosen("mla_cache_write", self._dtype, rank=rank, rope=rope)
        self._apart("mla_rotary_write", heads=heads, rank=rank, rope=rope)
        if self._cos_sin.shape[1] != rope:
            raise NotNative("another width is rotated than the keys' part has")
        w_uk, w_uv, packed = weights
        up, absorb, least = _NOTHING, _NOTHING, ABSORBED_TOKENS
        reads_packed = {variants[1], variants[3], variants[4]} == {_VARIANTS["cpu/avx512bf16"]}  # as chosen or tuned
        if prefill.endswith("/absorbed"):
            self._absorbs, least = lambda _: _MLA_PROMPT_TOKENS_MAX, 1 << 40
        elif packed is None or not reads_packed:
            self._absorbs = functools.partial(absorbed_tokens_max, rank, shape.nope, shape.value)
        if packed is not None and reads_packed:
            self._kept.append(packed)
            up, absorb = (_integers(matrix, matrix.columns) for matrix in (packed.up, packed.absorb))
        room = tuple(
            self._once(name, heads * width, self._dtype)
            for name, width in (("q_rope", rope), ("q_latent", rank), ("attended latents", rank))
        )
        self.native.mla(
            variants,
            self._code,
            (heads, shape.nope, rope, rank, shape.value),
            shape.interleaved,
            shape.scale,
            self._address(w_uk),
            self._address(w_uv),
            self._cos_sin.data_ptr(),
            (shape.down_width, shape.rope_at),
            self._layers,
            (up, absorb, least),
            side,
            (*inputs, *room, out),
        )
        self._layers += side is not Side.KEYS

    def route(self, x: int, weight: Tensor, bias: Tensor | None, shape: RouteShape) -> tuple[int, int]:
        """As `ops.moe_route` of x's product with `weight` f32 [experts, d]; `bias` f32. Buffers: experts, weights."""
        width = weight.shape[1]
        variants = (
            self._chosen("linear", torch.float32, width=width, columns=shape.experts),
            self._chosen("moe_route", torch.float32, experts=shape.experts),
        )
        wide = -1 if self._dtype is torch.float32 else self._once("wide", width, torch.float32)
        logits = self._once("scores", shape.experts, torch.float32)
        chosen, weights = (
            self._once("chosen", shape.top_k, torch.int32),
            self._once("shares", shape.top_k, torch.float32),
        )
        self.native.route(
            variants,
            self._code,
            width,
            self._address(weight, torch.float32),
            0 if bias is None else self._address(bias, torch.float32),
            (shape.experts, shape.top_k, shape.groups, shape.groups_top_k),
            (shape.sigmoid, shape.normalize, shape.top2),
            shape.scale,
            (x, wide, logits, chosen, weights),
        )
        return chosen, weights

    def experts(
        self, x: int, routed: tuple[int, int], top_k: int, gate_up: AnyWeight, down: AnyWeight, out: int
    ) -> None:
        """As `ops.moe` and its kin; `routed`: what `route` gave."""
        if isinstance(gate_up, Tensor) or isinstance(down, Tensor):
            assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)
            count, d, f = down.shape
            isa = self._chosen("moe", self._dtype, experts=count, width=d, hidden=f)
            first = (isa, 0, False, (0, 0, count * 2 * f, d, self._address(gate_up), 0))
            second = (isa, 0, False, (0, 0, count * d, f, self._address(down), 0))
        else:
            self._kept += [gate_up, down]
            packed = isinstance(down, PackedWeight)
            count = down.experts if isinstance(down, PackedWeight) else down.scales.shape[0]
            f, d = down.width, gate_up.width
            sizes = {"experts": count, "width": d, "hidden": f, "bits": down.bits, "group": down.group}
            isa = self._chosen("packed_moe" if packed else "quantized_moe", self._dtype, **sizes)
            first = (isa, isa, packed, _integers(gate_up, count * 2 * f))
            second = (isa, isa, packed, _integers(down, count * d))
        self.native.experts(self._code, first, second, (count, top_k, d, f), (x, *routed, out))

    def add(self, a: int, b: int, width: int, out: int) -> None:
        """a + b; `out` may be either."""
        isa = self._chosen("silu_mul", self._dtype, width=2 * width)  # any that runs here: sums have one rounding
        self.native.add(isa, self._code, width, a, b, out)

    def takes(self, batch: AttentionBatch) -> bool:
        """Whether this step's rows are computed by it as by the operations one by one; see `takes_chunks`."""
        if self._absorbs is None or batch.decodes == batch.slots.shape[0]:
            return True
        lengths, starts = batch.lengths[batch.decodes :], batch.starts[batch.decodes :]
        return self.takes_chunks(batch.positions.shape[0] - batch.decodes, int(lengths.max()), int(starts.min()))

    def takes_chunks(self, tokens: int, chunk_max: int, start_min: int) -> bool:
        """For so many prompt tokens, so many in one row, and rows that begin at `start_min` or later. Long chunks of
        latent attention are projected up, which torch does, and many tokens need much room.
        """
        if self._absorbs is None:
            return True
        return tokens <= _MLA_PROMPT_TOKENS_MAX and chunk_max <= self._absorbs(start_min)

    def take(self, moves: list[tuple[int, int, int]]) -> None:
        """From here on only the sampled tokens: from which buffer into which they go, and how many elements of each."""
        self.native.take([(source, to, width * self._dtype.itemsize) for source, to, width in moves])

    def run(self, token_ids: Tensor, batch: AttentionBatch, caches: list[Tensor], sample_rows: Tensor) -> Tensor:
        """token_ids int64 [t], a cache per layer, sample_rows int64 [s] -> float32 logits [s, vocab]."""
        logits = torch.empty(sample_rows.shape[0], self.vocab)
        self._run(token_ids, batch, caches, sample_rows, logits)
        return logits

    def hidden(self, token_ids: Tensor, batch: AttentionBatch, caches: list[Tensor], width: int) -> Tensor:
        """As `run`, of a program that ends with a norm into LOGITS: what stands behind every token [t, width]."""
        out = torch.empty(token_ids.shape[0], width, dtype=self._dtype)
        self._run(token_ids, batch, caches, token_ids.new_empty(0), out)
        return out

    def _run(
        self, token_ids: Tensor, batch: AttentionBatch, caches: list[Tensor], sample_rows: Tensor, out: Tensor
    ) -> None:
        from tokenrelay.kernels.cpu.attention import native_batch

        if len(caches) != self._layers:
            raise ValueError(f"caches has {len(caches)} layers, the model {self._layers}")
        blocks, block_tokens = caches[0].shape[0], caches[0].shape[-2]
        self.native.run(
            native_batch(batch),
            token_ids.shape[0],
            batch.slots.shape[0],
            batch.decodes,
            sample_rows.shape[0],
            token_ids.data_ptr(),
            batch.positions.data_ptr(),
            batch.cache_slots.data_ptr(),
            sample_rows.data_ptr(),
            [cache.data_ptr() for cache in caches],
            blocks,
            block_tokens,
            out.data_ptr(),
        )

    def _once(self, name: str, width: int, dtype: torch.dtype) -> int:
        """A buffer that all layers share."""
        key = (name, width)
        if key not in self._shared:
            self._shared[key] = self.buffer(width, dtype)
        return self._shared[key]

    def _address(self, tensor: Tensor, dtype: torch.dtype | None = None) -> int:
        if not (tensor.is_cpu and tensor.is_contiguous() and tensor.dtype == (dtype or self._dtype)):
            raise NotNative(f"a tensor is {tensor.dtype} with strides {tensor.stride()} on {tensor.device}")
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _chosen(self, op: str, dtype: torch.dtype, **dims: int) -> int:
        path = self._kernel(op, dtype, **dims)
        if path not in _VARIANTS:
            raise NotNative(f"{op} runs {path}")
        return _VARIANTS[path]

    def _sampler_of(self, vocab: int) -> int | None:
        """The variant of `ops.sample`; None where it, or what looks for broken logits, is none of ours."""
        try:
            self._chosen("finite_rows", torch.float32, vocab=vocab)
            return self._chosen("sample", torch.float32, vocab=vocab)
        except NotNative:
            return None

    def _apart(self, op: str, **dims: int) -> None:
        """`op` calls the kernels of its parts, which the program has."""
        kernel = registry.select(op, device="cpu", dtype=str(self._dtype).removeprefix("torch."), **dims)
        if kernel.path != registry.PARTS:
            raise NotNative(f"{op} runs {kernel.path}")

    def _kernel(self, op: str, dtype: torch.dtype, **dims: int) -> str:
        """The path of what is chosen, one of ours."""
        kernel = registry.select(op, device="cpu", dtype=str(dtype).removeprefix("torch."), **dims)
        if kernel.source != "tokenrelay" or kernel.path.removesuffix("/absorbed") not in _VARIANTS:
            raise NotNative(f"{op} runs {kernel.path}")
        return kernel.path

    def _matrix(self, weight: AnyWeight) -> tuple[NativeMatrix, int]:
        """As the extension takes it, and its columns."""
        if isinstance(weight, Tensor):
            columns, width = weight.shape
            isa = self._chosen("linear", self._dtype, width=width, columns=columns)
            return (isa, 0, False, (0, 0, columns, width, self._address(weight), 0)), columns
        self._kept.append(weight)
        packed = isinstance(weight, PackedWeight)
        columns = weight.columns if isinstance(weight, PackedWeight) else weight.scales.shape[0]
        sizes = {"width": weight.width, "columns": columns, "bits": weight.bits, "group": weight.group}
        isa = self._chosen("packed_linear" if packed else "quantized_linear", self._dtype, **sizes)
        return (isa, isa, packed, _integers(weight, columns)), columns


def _integers(weight: QuantizedWeight | PackedWeight, columns: int) -> tuple[int, int, int, int, int, int]:
    """As the extension takes one matrix, or all experts' below each other."""
    return weight.bits, weight.group, columns, weight.width, weight.data.data_ptr(), weight.scales.data_ptr()

"""A model's step on the CPU as one call: its operations captured once, run without Python between them.

    program = Program(dtype=torch.bfloat16, cos_sin=table)
    x = program.embed(embedding)
    ...
    logits = program.run(token_ids, batch, caches, sample_rows)

Every operation is chosen by the registry, as `ops` chooses it; where that is no native CPU kernel, NotNative is raised
and the model runs op by op. The same functions are called, so results are equal bit by bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenrelay.kernels import registry
from tokenrelay.kernels.batch import AttentionBatch
from tokenrelay.kernels.packed import PackedWeight
from tokenrelay.kernels.quantized import QuantizedWeight

if TYPE_CHECKING:
    from tokenrelay.kernels._cpu import NativeMatrix

AnyWeight = Tensor | QuantizedWeight | PackedWeight
_CODES = {torch.float32: 0, torch.bfloat16: 1}
_VARIANTS = {"cpu/baseline": 0, "cpu/avx2": 1, "cpu/avx512": 2, "cpu/avx512bf16": 3, "cpu/avx512vnni": 2}


class NotNative(Exception):
    """An operation that no native CPU kernel is chosen for."""


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
        self._native = native.Program(cos_sin.shape[0])
        self._dtype = dtype
        self._code = _CODES[dtype]
        self._cos_sin = cos_sin
        self._kept: list[object] = [cos_sin]  # what the program holds addresses of
        self._vocab = 0
        self._layers = 0

    def buffer(self, width: int, dtype: torch.dtype | None = None) -> int:
        """Room for `width` elements of each token."""
        return self._native.buffer(width * (dtype or self._dtype).itemsize)

    def embed(self, table: Tensor, out: int) -> None:
        """Rows of `table` [vocab, d] by token id."""
        vocab, width = table.shape
        self._native.embed(self._code, vocab, width, self._address(table), out)

    def norm(self, x: int, weight: Tensor, eps: float, out: int, residual: int = -1) -> None:
        """As `ops.rms_norm`, or with `residual` as `ops.add_rms_norm`, the sum taking its place."""
        op = "rms_norm" if residual < 0 else "add_rms_norm"
        width = weight.shape[0]
        isa = self._chosen(op, self._dtype, width=width)
        self._native.norm(isa, self._code, width, x, residual, self._address(weight), eps, out)

    def linear(self, x: int, weight: AnyWeight, bias: Tensor | None, out: int) -> None:
        """As `ops.linear` and its kin; into LOGITS in float32."""
        matrix, columns = self._matrix(weight)
        wide = out == self.LOGITS
        if wide:
            self._vocab = columns
        self._native.linear(
            self._code, 0 if wide else self._code, matrix, x, 0 if bias is None else self._address(bias), out
        )

    def silu_mul(self, x: int, width: int, out: int) -> None:
        """As `ops.silu_mul`: 2 * `width` elements -> `width`."""
        self._native.silu_mul(self._chosen("silu_mul", self._dtype, width=2 * width), self._code, width, x, out)

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
    ) -> None:
        """Norms, rotation, cache write and attention of the next layer; `heads`: query heads, KV heads, head_dim."""
        count, kv_heads, head_dim = heads
        sizes = {"heads": count, "kv_heads": kv_heads, "head_dim": head_dim, "block_tokens": block_tokens}
        decode = self._chosen("gqa_decode", self._dtype, **sizes)
        prefill = self._chosen("gqa_prefill", self._dtype, **sizes)
        rotary = self._chosen("rotary", self._dtype, rope=head_dim)
        norm = rotary if norms is None else self._chosen("rms_norm", self._dtype, width=head_dim)
        self._chosen("gqa_cache_write", self._dtype, kv_heads=kv_heads, head_dim=head_dim)
        if self._cos_sin.shape[1] != head_dim:
            raise NotNative("a part of each head is rotated")
        q_norm, k_norm = (0, 0) if norms is None else (self._address(norms[0]), self._address(norms[1]))
        self._native.gqa(
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
            qkv,
            q,
            out,
        )
        self._layers += 1

    def take(self, width: int, moves: list[tuple[int, int]]) -> None:
        """From here on only the sampled tokens: each pair says from which buffer into which they go."""
        self._native.take(width * self._dtype.itemsize, moves)

    def run(self, token_ids: Tensor, batch: AttentionBatch, caches: list[Tensor], sample_rows: Tensor) -> Tensor:
        """token_ids int64 [t], a GQA cache per layer, sample_rows int64 [s] -> float32 logits [s, vocab]."""
        from tokenrelay.kernels.cpu.attention import native_batch

        if len(caches) != self._layers:
            raise ValueError(f"caches has {len(caches)} layers, the model {self._layers}")
        blocks, block_tokens = caches[0].shape[0], caches[0].shape[-2]
        logits = torch.empty(sample_rows.shape[0], self._vocab)
        self._native.run(
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
            logits.data_ptr(),
        )
        return logits

    def _address(self, tensor: Tensor) -> int:
        if not (tensor.is_cpu and tensor.is_contiguous() and tensor.dtype == self._dtype):
            raise NotNative(f"a tensor is {tensor.dtype} with strides {tensor.stride()} on {tensor.device}")
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _chosen(self, op: str, dtype: torch.dtype, **dims: int) -> int:
        kernel = registry.select(op, device="cpu", dtype=str(dtype).removeprefix("torch."), **dims)
        if kernel.source != "tokenrelay" or kernel.path not in _VARIANTS:
            raise NotNative(f"{op} runs {kernel.path}")
        return _VARIANTS[kernel.path]

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
        addresses = (weight.data.data_ptr(), weight.scales.data_ptr())
        return (isa, isa, packed, (weight.bits, weight.group, columns, weight.width, *addresses)), columns

"""What an operation cannot avoid: the bytes it reads and writes, and its multiply-adds, from its arguments.

work = work_of("linear", (x, weight, None), y)
floor_s = work.floor_s(ceiling)         # at the rates that memory and arithmetic reach

Weights, caches and activations count once each, however often a kernel reads them. Sampling, routing and what else
costs neither much memory nor many products count what they read and write.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenrelay.kernels.batch import AttentionBatch
from tokenrelay.kernels.packed import PackedWeight
from tokenrelay.kernels.quantized import QuantizedWeight
from tokenrelay.kernels.scaled import BlockScaledWeight


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What this machine reaches."""

    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True, slots=True)
class Work:
    """Of one call, or of some."""

    bytes: int = 0
    flops: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def floor_s(self, ceiling: Ceiling) -> float:
        """The time that memory or arithmetic alone would take, whichever is longer."""
        return max(self.bytes / ceiling.bytes_per_s, self.flops / ceiling.flops_per_s)


def work_of(op: str, arguments: tuple[Any, ...], result: Any) -> Work:
    """Of a call of `ops.<op>` with these arguments, that gave `result`."""
    found = _WORK.get(op)
    return Work(_bytes(arguments) + _bytes(result)) if found is None else found(arguments, result)


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, QuantizedWeight | PackedWeight | BlockScaledWeight):
        return value.nbytes
    if isinstance(value, tuple | list):
        return sum(_bytes(part) for part in value)
    return 0


def _linear(arguments: tuple[Any, ...], result: Tensor) -> Work:
    x, weight = arguments[:2]
    return Work(_bytes((x, weight, result)), 2 * x.shape[0] * x.shape[1] * result.shape[1])


def _moe(arguments: tuple[Any, ...], result: Tensor) -> Work:
    x, experts, _, w_gate_up, w_down = arguments
    chosen = experts[experts >= 0]
    count = getattr(w_down, "experts", 0) or (w_down if isinstance(w_down, Tensor) else w_down.data).shape[0]
    hidden = w_down.shape[2] if isinstance(w_down, Tensor) else w_down.width
    read = _bytes((w_gate_up, w_down)) * len(chosen.unique()) // max(1, count)
    return Work(read + _bytes((x, result)), 6 * chosen.numel() * x.shape[1] * hidden)


def _extents(batch: AttentionBatch, prefill: bool) -> tuple[int, int]:
    """Cached tokens of the rows, and query-key pairs."""
    rows = slice(batch.decodes, None) if prefill else slice(0, batch.decodes)
    starts, lengths = batch.starts[rows].to(torch.int64), batch.lengths[rows].to(torch.int64)
    return int((starts + lengths).sum()), int((lengths * starts + lengths * (lengths + 1) // 2).sum())


def _gqa(prefill: bool) -> Callable[[tuple[Any, ...], Any], Work]:
    def work(arguments: tuple[Any, ...], result: Tensor) -> Work:
        q, cache, batch = arguments[:3]
        tokens, pairs = _extents(batch, prefill)
        _, both, kv_heads, _, head_dim = cache.shape
        read = tokens * both * kv_heads * head_dim * cache.element_size()
        return Work(read + _bytes((q, result)), 4 * pairs * q.shape[1] * head_dim)

    return work


def _mla_decode(arguments: tuple[Any, ...], result: Tensor) -> Work:
    q, q_rope, cache, batch = arguments[:4]
    tokens, pairs = _extents(batch, False)
    rank, rope = q.shape[2], q_rope.shape[2]
    read = tokens * cache.shape[-1] * cache.element_size()
    return Work(read + _bytes((q, q_rope, result)), 2 * pairs * q.shape[1] * (2 * rank + rope))


def _mla_prefill(arguments: tuple[Any, ...], result: Tensor) -> Work:
    q, q_rope, cache, batch, w_uk, w_uv = arguments[:6]
    tokens, pairs = _extents(batch, True)
    heads, nope, rope, value, rank = q.shape[1], q.shape[2], q_rope.shape[2], w_uv.shape[1], w_uk.shape[2]
    # Queries into the space of latents, or latents up to keys and values: the cheaper one.
    absorbed = pairs * (2 * rank + rope) + q.shape[0] * (nope + value) * rank
    projected = pairs * (nope + value + rope) + tokens * (nope + value) * rank
    read = tokens * cache.shape[-1] * cache.element_size()
    return Work(read + _bytes((q, q_rope, w_uk, w_uv, result)), 2 * heads * min(absorbed, projected))


def _heads(arguments: tuple[Any, ...], result: Tensor) -> Work:
    x, weight = arguments[:2]
    return Work(_bytes((x, weight, result)), 2 * x.shape[0] * weight.numel())


_WORK: dict[str, Callable[[tuple[Any, ...], Any], Work]] = {
    "linear": _linear,
    "quantized_linear": _linear,
    "packed_linear": _linear,
    "scaled_linear": _linear,
    "moe": _moe,
    "quantized_moe": _moe,
    "packed_moe": _moe,
    "scaled_moe": _moe,
    "gqa_decode": _gqa(False),
    "gqa_prefill": _gqa(True),
    "mla_decode": _mla_decode,
    "mla_prefill": _mla_prefill,
    "mla_absorb": _heads,
    "mla_expand": _heads,
    "rotary": lambda arguments, result: Work(2 * _bytes(result)),  # of the table it reads a row a token
    "gqa_rotary_write": lambda arguments, _: Work(2 * _bytes(arguments[:3])),
    "mla_rotary_write": lambda arguments, _: Work(2 * _bytes(arguments[:3])),
    "gqa_cache_write": lambda arguments, _: Work(2 * _bytes(arguments[:2])),
    "mla_cache_write": lambda arguments, _: Work(2 * _bytes(arguments[:2])),
}

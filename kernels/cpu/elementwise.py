"""Norms, rotary embedding, gated activation and cache writes on the CPU."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import tokenrelay.kernels._cpu as _native
from tokenrelay.kernels.cpu.variants import FLOATS, Variant, check, check_axes, check_dense, code_of, part
from tokenrelay.kernels.registry import Limit, register


def register_variant(variant: Variant) -> None:
    """Register every operation of this file for one set of inner loops."""
    if variant.pairs:
        return  # nothing here multiplies pairs
    for op, call in (
        ("rms_norm", rms_norm),
        ("add_rms_norm", add_rms_norm),
        ("rotary", rotary),
        ("silu_mul", silu_mul),
    ):
        limits = {"rope": Limit(2, 4096, 2)} if op == "rotary" else {}
        add = register(
            op=op, path=variant.path, isa=variant.isa, dtypes=FLOATS, limits=limits, priority=variant.priority
        )
        add(functools.partial(call, variant.code))
    if variant.code == 0:  # copies are the same everywhere
        register(op="mla_cache_write", path=variant.path, dtypes=FLOATS, layout="mla")(mla_cache_write)
        register(op="gqa_cache_write", path=variant.path, dtypes=FLOATS, layout="gqa")(gqa_cache_write)


def _rows(name: str, x: Tensor, width: int) -> Tensor:
    """`x` as [rows, width] with a contiguous last axis, without a copy where that is possible."""
    flat = x if x.dim() == 2 else x.reshape(-1, width)
    check(name, flat, x.dtype, (flat.shape[0], width))
    return flat


def rms_norm(isa: int, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `ops.rms_norm`; x may have more axes before the last."""
    width = x.shape[-1]
    code = code_of("x", x)
    check_dense("weight", weight, x.dtype, (width,))
    flat = _rows("x", x, width)
    out = torch.empty(x.shape, dtype=x.dtype)
    _native.rms_norm(
        isa,
        code,
        flat.shape[0],
        width,
        flat.data_ptr(),
        flat.stride(0),
        0,
        0,
        weight.data_ptr(),
        eps,
        out.data_ptr(),
        0,
    )
    return out


def add_rms_norm(isa: int, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `ops.add_rms_norm`."""
    width = x.shape[-1]
    code = code_of("x", x)
    check_dense("weight", weight, x.dtype, (width,))
    check("residual", residual, x.dtype, tuple(x.shape))
    flat, other = _rows("x", x, width), _rows("residual", residual, width)
    normed, total = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.shape, dtype=x.dtype)
    _native.rms_norm(
        isa,
        code,
        flat.shape[0],
        width,
        flat.data_ptr(),
        flat.stride(0),
        other.data_ptr(),
        other.stride(0),
        weight.data_ptr(),
        eps,
        normed.data_ptr(),
        total.data_ptr(),
    )
    return normed, total


def rotary(
    isa: int, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """See `ops.rotary`."""
    check_axes("q", q, 3)
    check_axes("k", k, 3)
    code = code_of("q", q)
    tokens, _, width = q.shape
    check_dense("positions", positions, torch.int64, (tokens,))
    check_axes("cos_sin", cos_sin, 2)
    check_dense("cos_sin", cos_sin, torch.float32, (cos_sin.shape[0], width))
    turned = []
    for name, x in (("q", q), ("k", k)):
        heads = x.shape[1]
        check(name, x, q.dtype, (tokens, heads, width))
        out = torch.empty(x.shape, dtype=x.dtype)
        _native.rotary(
            isa,
            code,
            tokens,
            heads,
            width,
            part(x),
            positions.data_ptr(),
            cos_sin.data_ptr(),
            cos_sin.shape[0],
            interleaved,
            out.data_ptr(),
        )
        turned.append(out)
    return turned[0], turned[1]


def silu_mul(isa: int, gate_up: Tensor) -> Tensor:
    """See `ops.silu_mul`."""
    width = gate_up.shape[-1]
    if width % 2:
        raise ValueError(f"gate_up has width {width}, expected an even one")
    code = code_of("gate_up", gate_up)
    flat = _rows("gate_up", gate_up, width)
    out = torch.empty(*gate_up.shape[:-1], width // 2, dtype=gate_up.dtype)
    _native.silu_mul(isa, code, flat.shape[0], width // 2, flat.data_ptr(), flat.stride(0), out.data_ptr())
    return out


def mla_cache_write(latent: Tensor, k_rope: Tensor, cache: Tensor, cache_slots: Tensor) -> None:
    """See `ops.mla_cache_write`."""
    check_axes("latent", latent, 2)
    check_axes("k_rope", k_rope, 2)
    check_axes("cache", cache, 3)
    (tokens, rank), rope = latent.shape, k_rope.shape[1]
    blocks, block_tokens, _ = cache.shape
    code = code_of("cache", cache)
    check_dense("cache", cache, cache.dtype, (blocks, block_tokens, rank + rope))
    check("latent", latent, cache.dtype, (tokens, rank))
    check("k_rope", k_rope, cache.dtype, (tokens, rope))
    check_dense("cache_slots", cache_slots, torch.int64, (tokens,))
    _native.mla_cache_write(
        code,
        tokens,
        rank,
        rope,
        latent.data_ptr(),
        latent.stride(0),
        k_rope.data_ptr(),
        k_rope.stride(0),
        cache.data_ptr(),
        blocks,
        block_tokens,
        cache_slots.data_ptr(),
    )


def gqa_cache_write(k: Tensor, v: Tensor, cache: Tensor, cache_slots: Tensor) -> None:
    """See `ops.gqa_cache_write`."""
    check_axes("k", k, 3)
    check_axes("cache", cache, 5)
    tokens, kv_heads, head_dim = k.shape
    blocks, _, _, block_tokens, _ = cache.shape
    code = code_of("cache", cache)
    check_dense("cache", cache, cache.dtype, (blocks, 2, kv_heads, block_tokens, head_dim))
    check("k", k, cache.dtype, (tokens, kv_heads, head_dim))
    check("v", v, cache.dtype, (tokens, kv_heads, head_dim))
    check_dense("cache_slots", cache_slots, torch.int64, (tokens,))
    _native.gqa_cache_write(
        code,
        tokens,
        kv_heads,
        head_dim,
        part(k),
        part(v),
        cache.data_ptr(),
        blocks,
        block_tokens,
        cache_slots.data_ptr(),
    )

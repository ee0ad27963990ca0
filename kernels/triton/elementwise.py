"""Norms, rotary embedding, gated activation and cache writes: launches."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from tokenrelay.kernels.layout import fp8_group
from tokenrelay.kernels.triton import elementwise_kernels as kernels
from tokenrelay.kernels.triton.checks import check, check_axes, check_dense
from tokenrelay.kernels.triton.mla import entry_of

_TILE = 4096  # elements of one program's tile of short rows


def _rows(x: Tensor) -> Tensor:
    """[..., width] as [rows, width] without a copy where strides allow."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `ops.rms_norm`."""
    out, _ = _norm(x, None, weight, eps)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `ops.add_rms_norm`."""
    return _norm(x, residual, weight, eps)


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    flat = _rows(x)
    rows = flat.shape[0]
    check("x", flat, x, (rows, width))
    check_dense("weight", weight, x, (width,))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total, added = out, flat
    if residual is not None:
        total = torch.empty_like(out)
        check("residual", residual, x, tuple(x.shape))
        added = _rows(residual)
    if rows == 0:
        return out, total
    block = triton.next_power_of_2(width)
    tile = max(1, _TILE // block)
    kernels.rms_norm[(triton.cdiv(rows, tile),)](
        flat,
        added,
        weight,
        out,
        total,
        rows,
        flat.stride(0),
        added.stride(0),
        eps,
        WIDTH=width,
        BLOCK=block,
        ROWS=tile,
        ADD=residual is not None,
        num_warps=min(16, max(4, block // 512)),
    )
    return out, total


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `ops.silu_mul`."""
    width = gate_up.shape[-1]
    if width % 2:
        raise ValueError(f"gate_up has width {width}, expected an even one")
    flat = _rows(gate_up)
    check("gate_up", flat, gate_up, (flat.shape[0], width))
    out = torch.empty((*gate_up.shape[:-1], width // 2), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        grid = (triton.cdiv(out.numel(), 2048),)
        kernels.silu_mul[grid](flat, out, out.numel(), flat.stride(0), WIDTH=width // 2, BLOCK=2048, num_warps=8)
    return out


def rotary(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """See `ops.rotary`. A token whose position is outside the table becomes NaN: waiting for the device costs more."""
    check_axes("q", q, 3)
    check_axes("k", k, 3)
    check_axes("cos_sin", cos_sin, 2)
    tokens, _, width = q.shape
    check_dense("positions", positions, q, (tokens,), torch.int64)
    check_dense("cos_sin", cos_sin, q, (cos_sin.shape[0], width), torch.float32)
    turned = []
    for name, x in (("q", q), ("k", k)):
        heads = x.shape[1]
        check(name, x, q, (tokens, heads, width))
        out = torch.empty((tokens, heads, width), dtype=x.dtype, device=x.device)
        if out.numel():
            block = triton.next_power_of_2(width // 2)
            block_h = min(triton.next_power_of_2(heads), max(1, 1024 // block))
            kernels.rotate[(tokens, triton.cdiv(heads, block_h))](
                x,
                out,
                positions,
                cos_sin,
                x.stride(0),
                x.stride(1),
                cos_sin.shape[0],
                HEADS=heads,
                HALF=width // 2,
                BLOCK_H=block_h,
                BLOCK_R=block,
                INTERLEAVED=interleaved,
                num_warps=4,
            )
        turned.append(out)
    return turned[0], turned[1]


def mla_cache_write(latent: Tensor, k_rope: Tensor, cache: Tensor, cache_slots: Tensor) -> None:
    """See `ops.mla_cache_write`; float8: see `MlaFp8Layout`, for bfloat16 tokens."""
    check_axes("latent", latent, 2)
    check_axes("k_rope", k_rope, 2)
    (tokens, rank), rope = latent.shape, k_rope.shape[1]
    entry = entry_of(cache, rank, rope)
    dtype = torch.bfloat16 if entry.group else cache.dtype
    check("latent", latent, cache, (tokens, rank), dtype)
    check("k_rope", k_rope, cache, (tokens, rope), dtype)
    check_dense("cache_slots", cache_slots, cache, (tokens,), torch.int64)
    if not tokens:
        return
    slots = cache.shape[0] * cache.shape[1]
    rope_p = triton.next_power_of_2(rope)
    strides = latent.stride(0), k_rope.stride(0)
    if not entry.group:
        kernels.write_mla[(tokens,)](
            latent,
            k_rope,
            cache,
            cache_slots,
            *strides,
            slots,
            RANK=rank,
            ROPE=rope,
            RANK_P=triton.next_power_of_2(rank),
            ROPE_P=rope_p,
            num_warps=2,
        )
        return
    kernels.write_mla_fp8[(tokens,)](
        latent,
        k_rope,
        entry.latents,
        entry.factors,
        entry.ropes,
        cache_slots,
        *strides,
        slots,
        RANK=rank,
        ROPE=rope,
        ROPE_P=rope_p,
        WIDTH=entry.latent_row,
        GROUPS_P=triton.next_power_of_2(rank // fp8_group(rank)),
        GROUP=fp8_group(rank),
        num_warps=2,
    )


def gqa_cache_write(k: Tensor, v: Tensor, cache: Tensor, cache_slots: Tensor) -> None:
    """See `ops.gqa_cache_write`."""
    check_axes("k", k, 3)
    check_axes("cache", cache, 5)
    tokens, heads, head_dim = k.shape
    blocks, _, _, page, _ = cache.shape
    check_dense("cache", cache, cache, (blocks, 2, heads, page, head_dim))
    check("k", k, cache, (tokens, heads, head_dim))
    check("v", v, cache, (tokens, heads, head_dim))
    check_dense("cache_slots", cache_slots, cache, (tokens,), torch.int64)
    if tokens:
        kernels.write_gqa[(tokens,)](
            k,
            v,
            cache,
            cache_slots,
            *k.stride()[:2],
            *v.stride()[:2],
            blocks * page,
            HEADS=heads,
            HEADS_P=triton.next_power_of_2(heads),
            HEAD_DIM=head_dim,
            HEAD_DIM_P=triton.next_power_of_2(head_dim),
            PAGE=page,
            num_warps=4,
        )

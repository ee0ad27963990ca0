"""Rotation of queries and keys and the cache write in one launch: what `rotary` and a cache write do in three."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from tokenrelay.kernels.triton import rotary_write_kernels as kernels
from tokenrelay.kernels.triton.checks import check, check_axes, check_dense
from tokenrelay.kernels.triton.gqa import vector_of
from tokenrelay.kernels.triton.mla import entry_of

_TILE = 1024  # pairs of one program's tile of heads


def _heads_of_a_tile(heads: int, block: int) -> int:
    wanted: int = triton.next_power_of_2(heads)
    return min(wanted, max(1, _TILE // block))


def _check_common(q: Tensor, positions: Tensor, cos_sin: Tensor, cache_slots: Tensor) -> None:
    tokens, _, width = q.shape
    if width % 2:
        raise ValueError(f"q has vectors of {width} elements, expected an even number")
    check_axes("cos_sin", cos_sin, 2)
    check_dense("positions", positions, q, (tokens,), torch.int64)
    check_dense("cos_sin", cos_sin, q, (cos_sin.shape[0], width), torch.float32)
    check_dense("cache_slots", cache_slots, q, (tokens,), torch.int64)


def gqa_rotary_write(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cos_sin: Tensor, cache: Tensor, cache_slots: Tensor
) -> Tensor:
    """See `ops.gqa_rotary_write`; into a float8 cache (`GqaFp8Layout`) go bfloat16 tokens. A token whose position is
    outside the table becomes NaN, as in `rotary`."""
    for name, x, axes in (("q", q, 3), ("k", k, 3), ("cache", cache, 5)):
        check_axes(name, x, axes)
    (tokens, heads, width), kv_heads = q.shape, k.shape[1]
    blocks, _, _, page, _ = cache.shape
    entry, dtype = vector_of(cache, width)
    check_dense("cache", cache, cache, (blocks, 2, kv_heads, page, entry))
    check("q", q, cache, (tokens, heads, width), dtype)
    check("k", k, cache, (tokens, kv_heads, width), dtype)
    check("v", v, cache, (tokens, kv_heads, width), dtype)
    _check_common(q, positions, cos_sin, cache_slots)
    out = torch.empty((tokens, heads, width), dtype=q.dtype, device=q.device)
    if tokens == 0:
        return out
    block = triton.next_power_of_2(width // 2)
    block_h = _heads_of_a_tile(max(heads, kv_heads), block)
    parts = triton.cdiv(heads, block_h)
    kernels.rotate_write_gqa[(tokens, parts + triton.cdiv(kv_heads, block_h))](
        q,
        k,
        v,
        out,
        positions,
        cos_sin,
        cache,
        cache.view(torch.float32) if entry > width else cache,
        cache_slots,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        cos_sin.shape[0],
        blocks * page,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=width // 2,
        BLOCK_H=block_h,
        BLOCK_R=block,
        Q_PARTS=parts,
        PAGE=page,
        WIDTH=entry,
        SCALED=entry > width,
        num_warps=4,
    )
    return out


def mla_rotary_write(
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    interleaved: bool,
    cache: Tensor,
    cache_slots: Tensor,
) -> Tensor:
    """See `ops.mla_rotary_write`; into a float8 cache (`MlaFp8Layout`) go bfloat16 tokens."""
    for name, x, axes in (("q_rope", q_rope, 3), ("latent", latent, 2), ("k_rope", k_rope, 2)):
        check_axes(name, x, axes)
    (tokens, heads, rope), rank = q_rope.shape, latent.shape[1]
    entry = entry_of(cache, rank, rope)
    dtype = torch.bfloat16 if entry.group else cache.dtype
    check("q_rope", q_rope, cache, (tokens, heads, rope), dtype)
    check("latent", latent, cache, (tokens, rank), dtype)
    check("k_rope", k_rope, cache, (tokens, rope), dtype)
    _check_common(q_rope, positions, cos_sin, cache_slots)
    out = torch.empty((tokens, heads, rope), dtype=dtype, device=cache.device)
    if tokens == 0:
        return out
    block = triton.next_power_of_2(rope // 2)
    block_h = _heads_of_a_tile(heads, block)
    parts = triton.cdiv(heads, block_h)
    kernels.rotate_write_mla[(tokens, parts + 1)](
        q_rope,
        latent,
        k_rope,
        out,
        positions,
        cos_sin,
        entry.latents,
        entry.factors,
        entry.ropes,
        cache_slots,
        *q_rope.stride()[:2],
        latent.stride(0),
        k_rope.stride(0),
        cos_sin.shape[0],
        cache.shape[0] * cache.shape[1],
        HEADS=heads,
        RANK=rank,
        HALF=rope // 2,
        BLOCK_H=block_h,
        BLOCK_R=block,
        Q_PARTS=parts,
        INTERLEAVED=interleaved,
        WIDTH=entry.latent_row,
        ROPE_WIDTH=entry.rope_row,
        RANK_P=triton.next_power_of_2(rank),
        GROUPS_P=triton.next_power_of_2(rank // entry.group) if entry.group else 1,
        GROUP=entry.group,
        num_warps=4,
    )
    return out

"""Rotation and cache write in one launch: keys go from the projection into the cache, read once and written once."""

from __future__ import annotations

import triton.language as tl

from tokenrelay.kernels.triton.elementwise_kernels import angles, store_fp8, turn, turned
from tokenrelay.kernels.triton.language import jit, narrow, widen


@jit
def turn_heads(
    q: tl.tensor,
    q_head: tl.tensor,
    out: tl.tensor,
    token: tl.tensor,
    part: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
) -> None:
    """BLOCK_H of a token's query heads, the `part`-th ones, rotated into out [t, HEADS, 2 HALF]. q: of the token."""
    head = part * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = (head < HEADS)[:, None] & (tl.arange(0, BLOCK_R) < HALF)[None, :]
    target = out + (token * HEADS + head)[:, None] * (2 * HALF)
    turn(q + (head * q_head)[:, None], target, inside, cos, sin, HALF, BLOCK_R, INTERLEAVED)


@jit
def rotate_write_gqa(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out: tl.tensor,
    positions: tl.tensor,
    cos_sin: tl.tensor,
    cache: tl.tensor,
    factors: tl.tensor,
    cache_slots: tl.tensor,
    q_token: tl.tensor,
    q_head: tl.tensor,
    k_token: tl.tensor,
    k_head: tl.tensor,
    v_token: tl.tensor,
    v_head: tl.tensor,
    table_rows: tl.tensor,
    slots: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    Q_PARTS: tl.constexpr,
    PAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALED: tl.constexpr,
) -> None:
    """Grid (tokens, Q_PARTS + KV_HEADS / BLOCK_H): query heads first, then KV heads, BLOCK_H of them a program.

    q [t, HEADS, 2 HALF] -> out, contiguous; k and v -> cache [blocks, 2, KV_HEADS, PAGE, WIDTH]. A token whose slot is
    not in the cache is written nowhere, its queries are rotated. SCALED: as `GqaFp8Layout` says; `factors` is the cache
    as float32.
    """
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, BLOCK_R)
    cos, sin = angles(positions, cos_sin, token, table_rows, HALF, BLOCK_R)
    if part < Q_PARTS:
        turn_heads(q + token * q_token, q_head, out, token, part, cos, sin, HEADS, HALF, BLOCK_H, BLOCK_R, False)
    else:
        slot = tl.load(cache_slots + token)
        if (slot >= 0) & (slot < slots):
            head = (part - Q_PARTS) * BLOCK_H + tl.arange(0, BLOCK_H)
            inside = (head < KV_HEADS)[:, None] & (i < HALF)[None, :]
            row = ((slot // PAGE * 2 * KV_HEADS + head) * PAGE + slot % PAGE) * WIDTH
            values = row + KV_HEADS * PAGE * WIDTH
            from_k, from_v = (
                k + token * k_token + (head * k_head)[:, None],
                v + token * v_token + (head * v_head)[:, None],
            )
            if SCALED:
                x, y = turned(from_k, inside, cos, sin, i, i + HALF, k.dtype.element_ty)
                store_scaled(x, y, cache, factors, row, inside, head < KV_HEADS, HALF, BLOCK_R)
                x = tl.load(from_v + i[None, :], mask=inside, other=0.0)
                y = tl.load(from_v + HALF + i[None, :], mask=inside, other=0.0)
                store_scaled(x, y, cache, factors, values, inside, head < KV_HEADS, HALF, BLOCK_R)
            else:
                turn(from_k, cache + row[:, None], inside, cos, sin, HALF, BLOCK_R, False)
                at = cache + values[:, None] + i[None, :]
                tl.store(at, tl.load(from_v + i[None, :], mask=inside), mask=inside)
                tl.store(at + HALF, tl.load(from_v + HALF + i[None, :], mask=inside), mask=inside)


@jit
def store_scaled(
    x: tl.tensor,
    y: tl.tensor,
    cache: tl.tensor,
    factors: tl.tensor,
    row: tl.tensor,
    inside: tl.tensor,
    real: tl.tensor,
    HALF: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """Vectors of halves x and y [BLOCK_H, BLOCK_R], in E4M3 at elements `row` of the cache, factors behind them."""
    i = tl.arange(0, BLOCK_R)
    a, b = tl.where(inside, widen(x), 0.0), tl.where(inside, widen(y), 0.0)
    largest = tl.maximum(tl.max(tl.abs(a), 1), tl.max(tl.abs(b), 1))
    factor = tl.where(largest > 0.0, largest / 448.0, 1.0)
    at = cache + row[:, None] + i[None, :]
    tl.store(at, narrow(a / factor[:, None], tl.float8e4nv), mask=inside)
    tl.store(at + HALF, narrow(b / factor[:, None], tl.float8e4nv), mask=inside)
    tl.store(factors + (row + 2 * HALF) // 4, factor, mask=real)


@jit
def rotate_write_mla(
    q: tl.tensor,
    latent: tl.tensor,
    k: tl.tensor,
    out: tl.tensor,
    positions: tl.tensor,
    cos_sin: tl.tensor,
    latents: tl.tensor,
    factors: tl.tensor,
    ropes: tl.tensor,
    cache_slots: tl.tensor,
    q_token: tl.tensor,
    q_head: tl.tensor,
    latent_row: tl.tensor,
    k_row: tl.tensor,
    table_rows: tl.tensor,
    slots: tl.tensor,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    Q_PARTS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WIDTH: tl.constexpr,
    ROPE_WIDTH: tl.constexpr,
    RANK_P: tl.constexpr,
    GROUPS_P: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """Grid (tokens, Q_PARTS + 1): query heads, BLOCK_H a program, then the token's entry of the cache.

    latents, factors and ropes point at the cache's first token, a token of theirs is WIDTH, WIDTH / 4 and ROPE_WIDTH
    elements wide. GROUP: latents that share a factor, in E4M3; 0: latents of the cache's type, and no factors.
    """
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, BLOCK_R)
    cos, sin = angles(positions, cos_sin, token, table_rows, HALF, BLOCK_R)
    if part < Q_PARTS:
        turn_heads(q + token * q_token, q_head, out, token, part, cos, sin, HEADS, HALF, BLOCK_H, BLOCK_R, INTERLEAVED)
    else:
        slot = tl.load(cache_slots + token)
        if (slot >= 0) & (slot < slots):
            one = tl.arange(0, 1)[:, None]
            inside = (one < 1) & (i < HALF)[None, :]
            turn(k + token * k_row + one, ropes + slot * ROPE_WIDTH + one, inside, cos, sin, HALF, BLOCK_R, INTERLEAVED)
            if GROUP == 0:
                r = tl.arange(0, RANK_P)
                x = tl.load(latent + token * latent_row + r, mask=r < RANK)
                tl.store(latents + slot * WIDTH + r, x, mask=r < RANK)
            else:
                store_fp8(latent + token * latent_row, latents, factors, slot, RANK, WIDTH, GROUPS_P, GROUP)

"""Norms, rotation, gated activation and cache writes: each element is read and written once, so bytes are the floor."""

from __future__ import annotations

import triton.language as tl

from tokenrelay.kernels.triton.language import jit, narrow, widen


@jit
def rms_norm(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    total: tl.tensor,
    rows: tl.tensor,
    x_row: tl.tensor,
    residual_row: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ADD: tl.constexpr,
) -> None:
    """Grid (rows / ROWS). x [rows, WIDTH] -> out; with ADD x + residual -> total, rounded, is what is normed."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    wide_row = row.to(tl.int64)
    v = widen(tl.load(x + (wide_row * x_row)[:, None] + column[None, :], mask=inside, other=0.0))
    if ADD:
        v += widen(tl.load(residual + (wide_row * residual_row)[:, None] + column[None, :], mask=inside, other=0.0))
        rounded = narrow(v, total.dtype.element_ty)
        tl.store(total + (wide_row * WIDTH)[:, None] + column[None, :], rounded, mask=inside)
        v = widen(rounded)
    factor = 1.0 / tl.sqrt_rn(tl.sum(v * v, 1) / WIDTH + eps)
    w = widen(tl.load(weight + column, mask=column < WIDTH, other=0.0))
    y = v * factor[:, None] * w[None, :]
    tl.store(out + (wide_row * WIDTH)[:, None] + column[None, :], narrow(y, out.dtype.element_ty), mask=inside)


@jit
def silu_mul(
    gate_up: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    row_stride: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Grid (elements / BLOCK). gate_up [rows, 2 WIDTH] -> out [rows, WIDTH]; `count` elements of out."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    row, column = at // WIDTH, at % WIDTH
    gate = widen(tl.load(gate_up + row * row_stride + column, mask=inside, other=0.0))
    up = widen(tl.load(gate_up + row * row_stride + WIDTH + column, mask=inside, other=0.0))
    tl.store(out + at, narrow(gate / (1.0 + tl.exp(-gate)) * up, out.dtype.element_ty), mask=inside)


@jit
def angles(
    positions: tl.tensor,
    cos_sin: tl.tensor,
    token: tl.tensor,
    table_rows: tl.tensor,
    HALF: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Cosines and sines [BLOCK_R] of a token; no numbers where its position is outside the table."""
    i = tl.arange(0, BLOCK_R)
    position = tl.load(positions + token)
    known = (i < HALF) & (position >= 0) & (position < table_rows)
    row = cos_sin + position * (2 * HALF) + i
    return tl.load(row, mask=known, other=float("nan")), tl.load(row + HALF, mask=known, other=float("nan"))


@jit
def turned(
    source: tl.tensor,
    inside: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    dtype: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Rotated pairs of vectors: source pointers [BLOCK_H, 1], elements `first`, `second`, inside [BLOCK_H, BLOCK_R]."""
    a = widen(tl.load(source + first[None, :], mask=inside, other=0.0))
    b = widen(tl.load(source + second[None, :], mask=inside, other=0.0))
    c, s = cos[None, :], sin[None, :]
    return narrow(a * c - b * s, dtype), narrow(b * c + a * s, dtype)


@jit
def turn(
    source: tl.tensor,
    target: tl.tensor,
    inside: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    HALF: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
) -> None:
    """Rotate vectors of 2 HALF elements: source, target pointers [BLOCK_H, 1], inside [BLOCK_H, BLOCK_R]."""
    i = tl.arange(0, BLOCK_R)
    if INTERLEAVED:
        first, second = 2 * i, 2 * i + 1
    else:
        first, second = i, i + HALF
    x, y = turned(source, inside, cos, sin, first, second, target.dtype.element_ty)
    tl.store(target + first[None, :], x, mask=inside)
    tl.store(target + second[None, :], y, mask=inside)


@jit
def rotate(
    x: tl.tensor,
    out: tl.tensor,
    positions: tl.tensor,
    cos_sin: tl.tensor,
    x_token: tl.tensor,
    x_head: tl.tensor,
    table_rows: tl.tensor,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
) -> None:
    """Grid (tokens, heads / BLOCK_H). x [t, HEADS, 2 HALF] -> out, contiguous."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    i = tl.arange(0, BLOCK_R)
    inside = (head < HEADS)[:, None] & (i < HALF)[None, :]
    cos, sin = angles(positions, cos_sin, token, table_rows, HALF, BLOCK_R)
    source = x + token * x_token + (head * x_head)[:, None]
    turn(source, out + (token * HEADS + head)[:, None] * (2 * HALF), inside, cos, sin, HALF, BLOCK_R, INTERLEAVED)


@jit
def write_mla(
    latent: tl.tensor,
    rope: tl.tensor,
    cache: tl.tensor,
    cache_slots: tl.tensor,
    latent_row: tl.tensor,
    rope_row: tl.tensor,
    slots: tl.tensor,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    RANK_P: tl.constexpr,
    ROPE_P: tl.constexpr,
) -> None:
    """Grid (tokens). A token whose slot is not in the cache is written nowhere."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(cache_slots + token)
    if (slot >= 0) & (slot < slots):
        r, o = tl.arange(0, RANK_P), tl.arange(0, ROPE_P)
        entry = cache + slot * (RANK + ROPE)
        tl.store(entry + r, tl.load(latent + token * latent_row + r, mask=r < RANK), mask=r < RANK)
        tl.store(entry + RANK + o, tl.load(rope + token * rope_row + o, mask=o < ROPE), mask=o < ROPE)


@jit
def store_fp8(
    latent: tl.tensor,
    latents: tl.tensor,
    factors: tl.tensor,
    slot: tl.tensor,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS_P: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """One token's latents in E4M3 and their factors: the largest of a group becomes 448."""
    group, within = tl.arange(0, GROUPS_P), tl.arange(0, GROUP)
    at = group[:, None] * GROUP + within[None, :]
    x = widen(tl.load(latent + at, mask=at < RANK, other=0.0))
    largest = tl.max(tl.abs(x), 1)
    factor = tl.where(largest > 0.0, largest / 448.0, 1.0)
    small = narrow(x / factor[:, None], tl.float8e4nv)
    tl.store(latents + slot * WIDTH + at, small, mask=at < RANK)
    tl.store(factors + slot * (WIDTH // 4) + group, factor, mask=group < RANK // GROUP)


@jit
def write_mla_fp8(
    latent: tl.tensor,
    rope: tl.tensor,
    latents: tl.tensor,
    factors: tl.tensor,
    ropes: tl.tensor,
    cache_slots: tl.tensor,
    latent_row: tl.tensor,
    rope_row: tl.tensor,
    slots: tl.tensor,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    ROPE_P: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS_P: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """Grid (tokens). As `write_mla`: latents in E4M3, see `store_fp8`."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(cache_slots + token)
    if (slot >= 0) & (slot < slots):
        o = tl.arange(0, ROPE_P)
        store_fp8(latent + token * latent_row, latents, factors, slot, RANK, WIDTH, GROUPS_P, GROUP)
        tl.store(ropes + slot * (WIDTH // 2) + o, tl.load(rope + token * rope_row + o, mask=o < ROPE), mask=o < ROPE)


@jit
def write_gqa(
    k: tl.tensor,
    v: tl.tensor,
    cache: tl.tensor,
    cache_slots: tl.tensor,
    k_token: tl.tensor,
    k_head: tl.tensor,
    v_token: tl.tensor,
    v_head: tl.tensor,
    slots: tl.tensor,
    HEADS: tl.constexpr,
    HEADS_P: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_P: tl.constexpr,
    PAGE: tl.constexpr,
) -> None:
    """Grid (tokens). cache [blocks, 2, HEADS, PAGE, HEAD_DIM]."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(cache_slots + token)
    if (slot >= 0) & (slot < slots):
        h, d = tl.arange(0, HEADS_P)[:, None], tl.arange(0, HEAD_DIM_P)[None, :]
        inside = (h < HEADS) & (d < HEAD_DIM)
        at = cache + ((slot // PAGE * 2 * HEADS + h) * PAGE + slot % PAGE) * HEAD_DIM + d
        tl.store(at, tl.load(k + token * k_token + h * k_head + d, mask=inside), mask=inside)
        values = at + HEADS * PAGE * HEAD_DIM
        tl.store(values, tl.load(v + token * v_token + h * v_head + d, mask=inside), mask=inside)

"""Attention over keys and values that were projected up from latents, stretch by stretch of the context."""

from __future__ import annotations

import triton.language as tl

from tokenrelay.kernels.triton.language import dot, jit, narrow
from tokenrelay.kernels.triton.walk import soften


@jit
def attend(
    q_nope: tl.tensor,
    q_rope: tl.tensor,
    keys: tl.tensor,
    ropes: tl.tensor,
    values: tl.tensor,
    out: tl.tensor,
    state: tl.tensor,
    sums: tl.tensor,
    tokens: tl.tensor,
    start: tl.tensor,
    base: tl.tensor,
    count: tl.tensor,
    qn_token: tl.tensor,
    qn_head: tl.tensor,
    qr_token: tl.tensor,
    qr_head: tl.tensor,
    ropes_row: tl.tensor,
    out_token: tl.tensor,
    out_head: tl.tensor,
    scale: tl.tensor,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    NOPE_P: tl.constexpr,
    ROPE_P: tl.constexpr,
    VALUE_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
) -> None:
    """Grid (token tiles, HEADS). Queries `start` + i see the `count` keys at positions `base` + j up to their own.

    q_nope [t, h, nope], q_rope [t, h, rope], keys [count, h, nope], ropes [count, rope], values [count, h, v]. The
    state of the online softmax (state f32 [h, t, VALUE_P], sums f32 [h, t, 2]) goes from stretch to stretch; the LAST
    one writes out [t, h, v].
    """
    head = tl.program_id(1)
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = token < tokens
    wide = token.to(tl.int64)
    i, o, v = tl.arange(0, NOPE_P), tl.arange(0, ROPE_P), tl.arange(0, VALUE_P)
    qn = tl.load(
        q_nope + (wide * qn_token)[:, None] + head * qn_head + i[None, :],
        mask=real[:, None] & (i < NOPE)[None, :],
        other=0.0,
    )
    qr = tl.load(
        q_rope + (wide * qr_token)[:, None] + head * qr_head + o[None, :],
        mask=real[:, None] & (o < ROPE)[None, :],
        other=0.0,
    )
    kept = head.to(tl.int64) * tokens + wide
    if FIRST:
        m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, VALUE_P), tl.float32)
    else:
        m = tl.load(sums + kept * 2, mask=real, other=float("-inf"))
        total = tl.load(sums + kept * 2 + 1, mask=real, other=0.0)
        acc = tl.load(state + (kept * VALUE_P)[:, None] + v[None, :], mask=real[:, None], other=0.0)
    position = start + token - base  # in the stretch
    seen = tl.minimum(tl.max(tl.where(real, position, -1), 0) + 1, count)
    for n in range(0, tl.cdiv(seen, BLOCK_N)):
        key = n * BLOCK_N + tl.arange(0, BLOCK_N)
        there = (key < count)[:, None]
        row = key.to(tl.int64)
        k = tl.load(
            keys + (row * HEADS + head)[:, None] * NOPE + i[None, :], mask=there & (i < NOPE)[None, :], other=0.0
        )
        kr = tl.load(ropes + (row * ropes_row)[:, None] + o[None, :], mask=there & (o < ROPE)[None, :], other=0.0)
        scores = dot(qn, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        scores = dot(qr, tl.trans(kr), scores) * scale
        scores = tl.where((key[None, :] <= position[:, None]) & (key < count)[None, :], scores, float("-inf"))
        p, alpha, m, total = soften(scores, m, total)
        x = tl.load(
            values + (row * HEADS + head)[:, None] * VALUE + v[None, :], mask=there & (v < VALUE)[None, :], other=0.0
        )
        acc = dot(narrow(p, x.dtype), x, acc * alpha[:, None])
    if LAST:
        value = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        at_out = out + (wide * out_token)[:, None] + head * out_head + v[None, :]
        tl.store(at_out, narrow(value, out.dtype.element_ty), mask=real[:, None] & (v < VALUE)[None, :])
    else:
        tl.store(sums + kept * 2, m, mask=real)
        tl.store(sums + kept * 2 + 1, total, mask=real)
        tl.store(state + (kept * VALUE_P)[:, None] + v[None, :], acc, mask=real[:, None])

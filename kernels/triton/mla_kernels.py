"""Latent attention, absorbed: all heads of a sequence's queries read the same cache entries once.

Derivation of the tile sizes and floors: docs/kernels/triton.md.
"""

from __future__ import annotations

import triton.language as tl

from tokenrelay.kernels.triton.language import dot, jit, last_at_most, narrow, widen
from tokenrelay.kernels.triton.walk import SEARCH_BLOCK, piece, soften


@jit
def attend(
    q_latent: tl.tensor,
    q_rope: tl.tensor,
    latents: tl.tensor,
    ropes: tl.tensor,
    factors: tl.tensor,
    table: tl.tensor,
    out: tl.tensor,
    scratch: tl.tensor,
    sums: tl.tensor,
    first: tl.tensor,
    lengths: tl.tensor,
    starts: tl.tensor,
    slots: tl.tensor,
    segment: tl.tensor,
    tile: tl.tensor,
    steps: tl.tensor,
    cum: tl.tensor,
    share: tl.tensor,
    units: tl.tensor,
    table_row: tl.tensor,
    ql_token: tl.tensor,
    ql_head: tl.tensor,
    qr_token: tl.tensor,
    qr_head: tl.tensor,
    scale: tl.tensor,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    RANK_P: tl.constexpr,
    ROPE_P: tl.constexpr,
    LATENT_ROW: tl.constexpr,
    ROPE_ROW: tl.constexpr,
    FACTOR_ROW: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FIXED: tl.constexpr,
    SPLIT: tl.constexpr,
) -> None:
    """Grid (parts). q_latent [t, h, rank], q_rope [t, h, rope] -> out [t, h, rank], contiguous.

    `latents`, `ropes` and `factors` point to the three parts of a cache entry, whose rows are LATENT_ROW, ROPE_ROW and
    FACTOR_ROW elements apart; GROUP latents share a factor, 0: there are none. `scale` includes log2(e).
    """
    part = tl.program_id(0)
    step = tl.load(share)
    at = part * step
    end = tl.minimum(at + step, tl.load(cum + units))
    unit = last_at_most(cum, units, at, SEARCH_BLOCK)
    r, o = tl.arange(0, RANK_P), tl.arange(0, ROPE_P)
    while at < end:
        seg, place_in = tl.load(segment + unit), tl.load(tile + unit)
        begin, stop, then, place, whole, unit = piece(at, end, unit, part, cum, steps, FIXED, SPLIT)
        at = then
        row = place_in * BLOCK_M + tl.arange(0, BLOCK_M)
        real = row < tl.load(lengths + seg) * HEADS
        position = tl.load(starts + seg) + row // HEADS
        token, head = (tl.load(first + seg) + row // HEADS).to(tl.int64), row % HEADS
        pages = table + tl.load(slots + seg).to(tl.int64) * table_row
        q = tl.load(
            q_latent + (token * ql_token + head * ql_head)[:, None] + r[None, :],
            mask=real[:, None] & (r < RANK)[None, :],
            other=0.0,
        )
        qr = tl.load(
            q_rope + (token * qr_token + head * qr_head)[:, None] + o[None, :],
            mask=real[:, None] & (o < ROPE)[None, :],
            other=0.0,
        )
        context = tl.max(tl.where(real, position, -1), 0) + 1
        m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, RANK_P), tl.float32)
        for n in range(begin, stop):
            key = n * BLOCK_N + tl.arange(0, BLOCK_N)
            there = key < context
            page = tl.load(pages + key // PAGE, mask=there, other=0).to(tl.int64)
            entry = page * PAGE + key % PAGE
            latent = tl.load(
                latents + (entry * LATENT_ROW)[:, None] + r[None, :],
                mask=there[:, None] & (r < RANK)[None, :],
                other=0.0,
            )
            if GROUP > 0:
                g = tl.arange(0, RANK_P // GROUP)
                factor = tl.load(
                    factors + (entry * FACTOR_ROW)[:, None] + g[None, :],
                    mask=there[:, None] & (g < RANK // GROUP)[None, :],
                    other=0.0,
                )
                wide = tl.reshape(widen(latent), (BLOCK_N, RANK_P // GROUP, GROUP)) * factor[:, :, None]
                latent = narrow(tl.reshape(wide, (BLOCK_N, RANK_P)), q.dtype)
            rope = tl.load(
                ropes + (entry * ROPE_ROW)[:, None] + o[None, :], mask=there[:, None] & (o < ROPE)[None, :], other=0.0
            )
            scores = dot(q, tl.trans(latent), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
            scores = dot(qr, tl.trans(rope), scores) * scale
            scores = tl.where(key[None, :] <= position[:, None], scores, float("-inf"))
            p, alpha, m, total = soften(scores, m, total)
            acc = dot(narrow(p, latent.dtype), latent, acc * alpha[:, None])
        if whole:
            value = acc / tl.where(total == 0.0, 1.0, total)[:, None]
            at_out = out + ((token * HEADS + head) * RANK)[:, None] + r[None, :]
            tl.store(at_out, narrow(value, out.dtype.element_ty), mask=real[:, None] & (r < RANK)[None, :])
        else:
            left = place.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
            tl.store(scratch + (left * RANK_P)[:, None] + r[None, :], acc)
            tl.store(sums + left * 2, m)
            tl.store(sums + left * 2 + 1, total)

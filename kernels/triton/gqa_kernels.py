"""Grouped-query attention over a paged cache: the heads of a group read their keys and values once."""

from __future__ import annotations

import triton.language as tl

from tokenrelay.kernels.triton.language import dot, jit, last_at_most, narrow, widen
from tokenrelay.kernels.triton.walk import SEARCH_BLOCK, piece, soften


@jit
def attend(
    q: tl.tensor,
    cache: tl.tensor,
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
    q_token: tl.tensor,
    q_head: tl.tensor,
    scale: tl.tensor,
    ROWS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_P: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALED: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FIXED: tl.constexpr,
    SPLIT: tl.constexpr,
) -> None:
    """Grid (parts). q [t, h, hd], cache [blocks, 2, hk, PAGE, WIDTH] -> out [t, h, hd], contiguous; ROWS = h / hk.

    `scale` includes log2(e). SCALED: E4M3 with a float32 factor behind each vector (`GqaFp8Layout`); `factors` is the
    cache as float32. A key's factor is its column's of the scores, a value's its column's of the weights.
    """
    part = tl.program_id(0)
    step = tl.load(share)
    at = part * step
    end = tl.minimum(at + step, tl.load(cum + units))
    unit = last_at_most(cum, units, at, SEARCH_BLOCK)
    d = tl.arange(0, HEAD_P)
    while at < end:
        seg, place_in = tl.load(segment + unit), tl.load(tile + unit)
        begin, stop, then, place, whole, unit = piece(at, end, unit, part, cum, steps, FIXED, SPLIT)
        at = then
        span = tl.load(lengths + seg) * ROWS
        tiles = tl.maximum((span + BLOCK_M - 1) // BLOCK_M, 1)
        group = place_in // tiles
        row = (place_in % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
        real = row < span
        position = tl.load(starts + seg) + row // ROWS
        token, head = (tl.load(first + seg) + row // ROWS).to(tl.int64), group * ROWS + row % ROWS
        pages = table + tl.load(slots + seg).to(tl.int64) * table_row
        inside = real[:, None] & (d < HEAD_DIM)[None, :]
        query = tl.load(q + (token * q_token + head * q_head)[:, None] + d[None, :], mask=inside, other=0.0)
        context = tl.max(tl.where(real, position, -1), 0) + 1
        m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, HEAD_P), tl.float32)
        for n in range(begin, stop):
            key = n * BLOCK_N + tl.arange(0, BLOCK_N)
            there = key < context
            page = tl.load(pages + key // PAGE, mask=there, other=0).to(tl.int64)
            entry = ((page * (2 * KV_HEADS) + group) * PAGE + key % PAGE) * WIDTH
            loaded = there[:, None] & (d < HEAD_DIM)[None, :]
            k = tl.load(cache + entry[:, None] + d[None, :], mask=loaded, other=0.0)
            if SCALED:
                k = narrow(widen(k), q.dtype.element_ty)
            scores = dot(query, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)) * scale
            if SCALED:
                scores *= tl.load(factors + (entry + HEAD_DIM) // 4, mask=there, other=0.0)[None, :]
            scores = tl.where(key[None, :] <= position[:, None], scores, float("-inf"))
            p, alpha, m, total = soften(scores, m, total)
            values = entry + KV_HEADS * PAGE * WIDTH
            v = tl.load(cache + values[:, None] + d[None, :], mask=loaded, other=0.0)
            if SCALED:
                v = narrow(widen(v), q.dtype.element_ty)
                p *= tl.load(factors + (values + HEAD_DIM) // 4, mask=there, other=0.0)[None, :]
            acc = dot(narrow(p, v.dtype), v, acc * alpha[:, None])
        if whole:
            value = acc / tl.where(total == 0.0, 1.0, total)[:, None]
            at_out = out + ((token * (KV_HEADS * ROWS) + head) * HEAD_DIM)[:, None] + d[None, :]
            tl.store(at_out, narrow(value, out.dtype.element_ty), mask=inside)
        else:
            left = place.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
            tl.store(scratch + (left * HEAD_P)[:, None] + d[None, :], acc)
            tl.store(sums + left * 2, m)
            tl.store(sums + left * 2 + 1, total)

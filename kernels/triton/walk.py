"""Kernel parts that all attention kernels share: a program's walk along the work axis (schedule.py), the online softmax
(Milakov and Gimelshein 2018), and the merge of what pieces left."""

from __future__ import annotations

import triton.language as tl

from tokenrelay.kernels.triton.language import jit, last_at_most, narrow

SEARCH_BLOCK = tl.constexpr(1024)


@jit
def piece(
    at: tl.tensor,
    end: tl.tensor,
    unit: tl.tensor,
    part: tl.tensor,
    cum: tl.tensor,
    steps: tl.tensor,
    FIXED: tl.constexpr,
    SPLIT: tl.constexpr,
) -> tl.tensor:
    """The piece that begins at `at`: its steps [begin, stop) in its unit, where the next one begins, its place in the
    scratch buffer, whether it is its whole unit, and the next piece's unit."""
    base, after = tl.load(cum + unit), tl.load(cum + unit + 1)
    count = tl.load(steps + unit)
    if FIXED:
        begin = (at - base) * SPLIT
        stop = tl.minimum(begin + SPLIT, count)
        then = at + (count > 0).to(tl.int32)
        place = at
        whole = after - base <= 1
    else:
        begin = at - base
        then = tl.minimum(end, after)
        stop = then - base
        place = part + unit
        whole = (begin == 0) & (then == after)
    return begin, stop, then, place, whole, unit + (then == after).to(tl.int32)


@jit
def soften(scores: tl.tensor, m: tl.tensor, total: tl.tensor) -> tl.tensor:
    """One step of the online softmax in base 2: weights p of `scores` [m, n], what the vectors so far are scaled by,
    the new maximum and sum. A row that has seen nothing keeps -inf and 0."""
    m_new = tl.maximum(m, tl.max(scores, 1))
    safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(scores - safe[:, None])
    alpha = tl.exp2(m - safe)
    return p, alpha, m_new, total * alpha + tl.sum(p, 1)


@jit
def merge(
    scratch: tl.tensor,
    sums: tl.tensor,
    out: tl.tensor,
    first: tl.tensor,
    lengths: tl.tensor,
    segment: tl.tensor,
    tile: tl.tensor,
    cum: tl.tensor,
    share: tl.tensor,
    units: tl.tensor,
    out_token: tl.tensor,
    out_head: tl.tensor,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    WIDTH_P: tl.constexpr,
    PIECES: tl.constexpr,
    FIXED: tl.constexpr,
) -> None:
    """Grid (parts or units, BLOCK_M, widths): one row of a unit that was cut. Pieces are added in order, PIECES at a
    time, so the bits depend on where the unit was cut and on nothing else."""
    index, row = tl.program_id(0), tl.program_id(1)
    if FIXED:
        unit = index
        base, after = tl.load(cum + unit), tl.load(cum + unit + 1)
        begin, count = base, after - base
    else:
        # A cut lies inside a unit; of several in one unit the first is answered for. At most one for each program.
        step = tl.load(share)
        at = (index + 1) * step
        last = tl.load(cum + units)
        unit = last_at_most(cum, units, tl.minimum(at, last - 1), SEARCH_BLOCK)
        base, after = tl.load(cum + unit), tl.load(cum + unit + 1)
        answers = (at < last) & (at > base) & (at - step <= base)
        begin = index + unit
        count = tl.where(answers, (after - 1) // step - index + 1, 0)
    if count > 1:
        seg = tl.load(segment + unit)
        span = tl.load(lengths + seg) * ROWS
        tiles = (span + BLOCK_M - 1) // BLOCK_M
        place = tl.load(tile + unit)
        within = (place % tiles) * BLOCK_M + row
        if within < span:
            token = tl.load(first + seg) + within // ROWS
            head = (place // tiles) * ROWS + within % ROWS
            column = tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W)
            top = tl.full((), float("-inf"), tl.float32)
            for p in range(0, count, PIECES):
                i = p + tl.arange(0, PIECES)
                m = tl.load(sums + ((begin + i).to(tl.int64) * BLOCK_M + row) * 2, mask=i < count, other=float("-inf"))
                top = tl.maximum(top, tl.max(m, 0))
            top = tl.where(top == float("-inf"), 0.0, top)
            total = tl.zeros((), tl.float32)
            vector = tl.zeros((BLOCK_W,), tl.float32)
            for p in range(0, count, PIECES):
                i = p + tl.arange(0, PIECES)
                at_sum = ((begin + i).to(tl.int64) * BLOCK_M + row) * 2
                m = tl.load(sums + at_sum, mask=i < count, other=float("-inf"))
                weight = tl.exp2(m - top)
                total += tl.sum(tl.load(sums + at_sum + 1, mask=i < count, other=0.0) * weight, 0)
                at_row = ((begin + i).to(tl.int64) * BLOCK_M + row) * WIDTH_P
                x = tl.load(scratch + at_row[:, None] + column[None, :], mask=(i < count)[:, None], other=0.0)
                vector += tl.sum(x * weight[:, None], 0)
            value = vector / tl.where(total == 0.0, 1.0, total)
            at_out = out + token.to(tl.int64) * out_token + head * out_head + column
            tl.store(at_out, narrow(value, out.dtype.element_ty), mask=column < WIDTH)

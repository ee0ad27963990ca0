"""Products of float8 operands, scaled block by block."""

from __future__ import annotations

import triton.language as tl

from tokenrelay.kernels.triton.language import dot, jit, narrow, widen


@jit
def matmul(
    a: tl.tensor,
    a_factors: tl.tensor,
    b: tl.tensor,
    b_factors: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    depth: tl.tensor,
    groups: tl.tensor,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Grid (column tiles, row tiles). E4M3 a [rows, depth] b [columns, depth]^T -> out [rows, columns], all dense.

    a_factors f32 [rows, groups], b_factors f32 [columns / 128, groups]: groups are 128 of the depth.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    wide_n = n.to(tl.int64)[None, :] * depth
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for group in range(0, groups):
        k = group * 128 + tl.arange(0, 128)
        x = tl.load(a + (m * depth)[:, None] + k[None, :], mask=(m < rows)[:, None] & (k < depth)[None, :], other=0.0)
        w = tl.load(b + wide_n + k[:, None], mask=(n < columns)[None, :] & (k < depth)[:, None], other=0.0)
        product = dot(x, w, tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        of_rows = tl.load(a_factors + m * groups + group, mask=m < rows, other=0.0)
        of_columns = tl.load(b_factors + (n // 128) * groups + group, mask=n < columns, other=0.0)
        acc += product * (of_rows[:, None] * of_columns[None, :])
    if BIAS:
        acc += widen(tl.load(bias + n, mask=n < columns, other=0.0))[None, :]
    at = out + (m * columns)[:, None] + n[None, :]
    tl.store(at, narrow(acc, out.dtype.element_ty), mask=(m < rows)[:, None] & (n < columns)[None, :])


@jit
def quantize(
    x: tl.tensor,
    out: tl.tensor,
    factors: tl.tensor,
    width: tl.tensor,
    x_row: tl.tensor,
    groups: tl.tensor,
    BLOCK_G: tl.constexpr,
) -> None:
    """Grid (rows, groups / BLOCK_G). x [rows, width] -> E4M3, f32 [rows, groups]: the largest of 128 becomes 448."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    at = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    v = widen(tl.load(x + row * x_row + at, mask=at < width, other=0.0))
    top = tl.max(tl.abs(v), 1)
    factor = tl.where(top > 0.0, top / 448.0, 1.0)
    tl.store(out + row * width + at, narrow(v / factor[:, None], tl.float8e4nv), mask=at < width)
    tl.store(factors + row * groups + group, factor, mask=group < groups)

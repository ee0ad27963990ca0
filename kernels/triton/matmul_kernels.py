"""A matrix product whose rows depend on themselves alone: tiles of one size, the depth walked in order, never cut."""

from __future__ import annotations

import triton.language as tl

from tokenrelay.kernels.triton.language import dot, jit, narrow, widen


@jit
def matmul(
    a: tl.tensor,
    b: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    depth: tl.tensor,
    a_batch: tl.tensor,
    a_row: tl.tensor,
    b_batch: tl.tensor,
    b_column: tl.tensor,
    b_depth: tl.tensor,
    out_batch: tl.tensor,
    out_row: tl.tensor,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Grid (column tiles, row tiles, batch). a [batch, rows, depth], b of any strides -> out [batch, rows, columns]."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    wide_n = n.to(tl.int64)
    for first in range(0, depth, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x = tl.load(
            a + batch * a_batch + (m * a_row)[:, None] + k[None, :],
            mask=(m < rows)[:, None] & (k < depth)[None, :],
            other=0.0,
        )
        w = tl.load(
            b + batch * b_batch + (wide_n * b_column)[None, :] + (k.to(tl.int64) * b_depth)[:, None],
            mask=(n < columns)[None, :] & (k < depth)[:, None],
            other=0.0,
        )
        acc = dot(x, w, acc)
    if BIAS:
        acc += widen(tl.load(bias + n, mask=n < columns, other=0.0))[None, :]
    at = out + batch * out_batch + (m * out_row)[:, None] + n[None, :]
    tl.store(at, narrow(acc, out.dtype.element_ty), mask=(m < rows)[:, None] & (n < columns)[None, :])

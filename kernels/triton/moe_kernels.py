"""Grouped matrix products: each tile of rows belongs to one expert and reads that expert's weights."""

from __future__ import annotations

import triton.language as tl

from tokenrelay.kernels.triton.language import dot, jit, narrow


@jit
def experts(
    a: tl.tensor,
    a_factors: tl.tensor,
    b: tl.tensor,
    b_factors: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    order: tl.tensor,
    offsets: tl.tensor,
    tile_expert: tl.tensor,
    tile_first: tl.tensor,
    a_row: tl.tensor,
    depth: tl.tensor,
    columns: tl.tensor,
    b_expert: tl.tensor,
    f_expert: tl.tensor,
    f_row: tl.tensor,
    TOP_K: tl.constexpr,
    GATED: tl.constexpr,
    SCALED: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Grid (tiles, column tiles). Choices sorted by expert: `order` [t k], expert e has [offsets[e], offsets[e + 1]).

    GATED: a [t, depth] by token, b [E, 2 columns, depth] -> out [t k, columns] = silu(gate) * up, in sorted order.
    Else: a [t k, depth] in sorted order, b [E, columns, depth] -> out f32 [t k, columns] by choice, times its weight.
    SCALED: both operands are float8; factors of a [rows, depth / 128], of b one for each 128 x 128.
    """
    tile = tl.program_id(0)
    expert = tl.load(tile_expert + tile)
    if expert < EXPERTS:  # tiles beyond the last one, and choices that live elsewhere, have none
        end = tl.load(offsets + expert + 1)
        row = tl.load(tile_first + tile) + tl.arange(0, BLOCK_M)
        real = row < end
        choice = tl.load(order + row, mask=real, other=0)
        source = (choice // TOP_K if GATED else row).to(tl.int64)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        base = b + expert.to(tl.int64) * b_expert
        wide_n = n.to(tl.int64)[None, :] * depth
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc_up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for first in range(0, depth, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            x = tl.load(
                a + (source * a_row)[:, None] + k[None, :], mask=real[:, None] & (k < depth)[None, :], other=0.0
            )
            inside = (n < columns)[None, :] & (k < depth)[:, None]
            w = tl.load(base + wide_n + k[:, None], mask=inside, other=0.0)
            if SCALED:
                block = first // 128
                scale = tl.load(a_factors + source * tl.cdiv(depth, 128) + block, mask=real, other=0.0)[:, None]
                factor = b_factors + expert.to(tl.int64) * f_expert + block
                product = dot(x, w, tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
                acc += product * (scale * tl.load(factor + (n // 128) * f_row, mask=n < columns, other=0.0)[None, :])
            else:
                acc = dot(x, w, acc)
            if GATED:
                up = tl.load(base + columns.to(tl.int64) * depth + wide_n + k[:, None], mask=inside, other=0.0)
                if SCALED:
                    product = dot(x, up, tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
                    at_factor = factor + ((columns + n) // 128) * f_row
                    acc_up += product * (scale * tl.load(at_factor, mask=n < columns, other=0.0)[None, :])
                else:
                    acc_up = dot(x, up, acc_up)
        if GATED:
            value = acc / (1.0 + tl.exp(-acc)) * acc_up
            target = row.to(tl.int64)
        else:
            value = acc * tl.load(weights + choice, mask=real, other=0.0)[:, None]
            target = choice.to(tl.int64)
        at = out + (target * columns)[:, None] + n[None, :]
        tl.store(at, narrow(value, out.dtype.element_ty), mask=real[:, None] & (n < columns)[None, :])


@jit
def gather(
    parts: tl.tensor,
    chosen: tl.tensor,
    out: tl.tensor,
    width: tl.tensor,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Grid (tokens, width / BLOCK). parts f32 [t, k, width] -> out [t, width], summed in the order of choices."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, TOP_K):
        expert = tl.load(chosen + token * TOP_K + i)
        here = (expert >= 0) & (expert < EXPERTS)
        total += tl.load(parts + (token * TOP_K + i) * width + column, mask=(column < width) & here, other=0.0)
    tl.store(out + token * width + column, narrow(total, out.dtype.element_ty), mask=column < width)

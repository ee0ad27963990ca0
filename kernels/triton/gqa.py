"""Grouped-query attention over the paged cache: the choice of tiles, and launches."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from tokenrelay.kernels.batch import AttentionBatch
from tokenrelay.kernels.layout import FACTOR_BYTES
from tokenrelay.kernels.triton import gqa_kernels
from tokenrelay.kernels.triton.checks import check, check_axes, check_dense
from tokenrelay.kernels.triton.language import INTERPRET, LOG2_E
from tokenrelay.kernels.triton.mla import launch_merge
from tokenrelay.kernels.triton.schedule import Tiling, work_of

# block_n, warps, stages, programs of a multiprocessor, by block_m (docs/kernels/triton.md).
_SHAPES = {16: (64, 4, 5, 3), 32: (64, 4, 5, 2), 64: (64, 4, 4, 2), 128: (64, 8, 3, 1)}


def tiling_of(rows: int, kv_heads: int, queries: int, dtype: torch.dtype, *, fixed: bool) -> Tiling:
    """Tiles for `queries` tokens of `rows` heads: as few rows as hold them, at most 128; in fixed mode always the same,
    so that decode and prefill have the same bits."""
    if INTERPRET.value:
        return Tiling(rows, kv_heads, 16 if fixed or queries <= 8 else 32, 32, fixed)
    if dtype is torch.float32:
        return Tiling(rows, kv_heads, 16, 32, fixed)
    block_m = 64 if fixed else min(128, max(16, triton.next_power_of_2(rows * queries)))
    block_n, warps, stages, programs = _SHAPES[block_m]
    if dtype is torch.float8_e4m3fn:
        programs = min(2, programs)  # converting to bfloat16 takes registers
    return Tiling(rows, kv_heads, block_m, block_n, fixed, warps, stages, programs)


def vector_of(cache: Tensor, head_dim: int) -> tuple[int, torch.dtype]:
    """Elements from one key or value of a head to the next in the cache, and the type of tokens and queries."""
    if cache.dtype is not torch.float8_e4m3fn:
        return head_dim, cache.dtype
    if head_dim % FACTOR_BYTES:
        raise ValueError(f"head_dim is {head_dim}, a float8 cache takes a multiple of {FACTOR_BYTES}")
    return head_dim + FACTOR_BYTES, torch.bfloat16


def gqa_decode(fixed: bool, q: Tensor, cache: Tensor, batch: AttentionBatch, scale: float) -> Tensor:
    """See `ops.gqa_decode`."""
    if q.shape[0] != batch.decodes:
        raise ValueError(f"q has {q.shape[0]} rows, the batch has {batch.decodes} decodes")
    queries = batch.group_max if batch.groups is not None else 1
    return _attend(fixed, q, cache, batch, scale, queries=queries, decode=True)


def gqa_prefill(fixed: bool, q: Tensor, cache: Tensor, batch: AttentionBatch, scale: float) -> Tensor:
    """See `ops.gqa_prefill`."""
    tokens = batch.positions.shape[0] - batch.decodes
    if q.shape[0] != tokens:
        raise ValueError(f"q has {q.shape[0]} tokens, the batch has {tokens} prefill tokens")
    return _attend(fixed, q, cache, batch, scale, queries=max(tokens, 1), decode=False)


def _attend(
    fixed: bool, q: Tensor, cache: Tensor, batch: AttentionBatch, scale: float, *, queries: int, decode: bool
) -> Tensor:
    check_axes("q", q, 3)
    check_axes("cache", cache, 5)
    tokens, heads, head_dim = q.shape
    blocks, _, kv_heads, page, _ = cache.shape
    width, dtype = vector_of(cache, head_dim)
    check_dense("cache", cache, cache, (blocks, 2, kv_heads, page, width))
    check("q", q, cache, (tokens, heads, head_dim), dtype)
    if heads % kv_heads:
        raise ValueError(f"q has {heads} heads, expected a multiple of KV heads, {kv_heads}")
    out = torch.empty((tokens, heads, head_dim), dtype=q.dtype, device=q.device)
    if tokens == 0:
        return out
    tiling = tiling_of(heads // kv_heads, kv_heads, queries, cache.dtype, fixed=fixed)
    work = work_of(batch, tiling, decode=decode)
    head_p = max(16, triton.next_power_of_2(head_dim))
    scratch, sums = work.scratch(tiling.block_m, head_p)
    gqa_kernels.attend[(work.parts,)](
        q,
        cache,
        cache.view(torch.float32) if width > head_dim else cache,
        batch.block_table,
        out,
        scratch,
        sums,
        *work.arrays,
        batch.block_table.stride(0),
        *q.stride()[:2],
        scale * LOG2_E.value,
        ROWS=tiling.rows,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        HEAD_P=head_p,
        WIDTH=width,
        SCALED=width > head_dim,
        PAGE=page,
        BLOCK_M=tiling.block_m,
        BLOCK_N=tiling.block_n,
        FIXED=fixed,
        SPLIT=work.split,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    launch_merge(scratch, sums, out, work, tiling, head_dim)
    return out

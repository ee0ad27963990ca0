"""Latent attention over the paged cache: the choice of tiles, launches, and the cache in float8."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from tokenrelay.kernels.batch import AttentionBatch
from tokenrelay.kernels.layout import fp8_group
from tokenrelay.kernels.triton import mla_kernels
from tokenrelay.kernels.triton.checks import check, check_axes, check_dense
from tokenrelay.kernels.triton.language import INTERPRET, LOG2_E
from tokenrelay.kernels.triton.schedule import Tiling, Work, work_of
from tokenrelay.kernels.triton.walk import merge

MERGE_PIECES = 16
MERGE_WIDTH = 128


@dataclass(frozen=True, slots=True)
class Entry:
    """The cache as kernels point into it: three views, and elements from one token to the next in each."""

    latents: Tensor
    ropes: Tensor
    factors: Tensor
    latent_row: int
    rope_row: int
    factor_row: int
    group: int  # latents that share a factor; 0: there are no factors


def entry_of(cache: Tensor, rank: int, rope: int) -> Entry:
    """The parts of `cache` [blocks, block_tokens, width]. ValueError where the width is another."""
    check_axes("cache", cache, 3)
    blocks, block_tokens, width = cache.shape
    if cache.dtype is not torch.float8_e4m3fn:
        check_dense("cache", cache, cache, (blocks, block_tokens, rank + rope))
        flat = cache.view(-1)
        return Entry(flat, flat[rank:], flat, width, width, width, 0)
    group = fp8_group(rank)
    check_dense("cache", cache, cache, (blocks, block_tokens, rank + 4 * (rank // group) + 2 * rope))
    flat = cache.view(-1)
    factors = flat.view(torch.float32)[rank // 4 :]
    ropes = flat.view(torch.bfloat16)[(rank + 4 * (rank // group)) // 2 :]
    return Entry(flat, ropes, factors, width, width // 2, width // 4, group)


# block_n, warps, stages, programs of a multiprocessor, by block_m: what compiles for sm_90 without spilling much and
# keeps two tiles of the cache on their way (docs/kernels/triton.md).
_SHAPES = {16: (32, 4, 5, 2), 32: (32, 8, 5, 2), 64: (64, 8, 2, 1)}
_SHAPES_FP8 = {16: (64, 8, 3, 1), 64: (64, 8, 2, 1)}


def tiling_of(heads: int, queries: int, dtype: torch.dtype, *, fixed: bool) -> Tiling:
    """Rows of a tile: as few as hold the heads of all queries, 64 at most; in fixed mode always the same, so that
    decode and prefill have the same bits."""
    if INTERPRET.value:
        return Tiling(heads, 1, 16, 32, fixed)
    if dtype is torch.float32:
        return Tiling(heads, 1, 16, 16, fixed)
    rows = 64 if fixed else min(64, max(16, triton.next_power_of_2(heads * queries)))
    shapes = _SHAPES_FP8 if dtype is torch.float8_e4m3fn else _SHAPES
    rows = next(m for m in shapes if m >= rows)
    block_n, warps, stages, programs = shapes[rows]
    return Tiling(heads, 1, rows, block_n, fixed, warps, stages, programs)


def mla_decode(
    fixed: bool, q_latent: Tensor, q_rope: Tensor, cache: Tensor, batch: AttentionBatch, scale: float
) -> Tensor:
    """See `ops.mla_decode`."""
    check_axes("q_latent", q_latent, 3)
    if q_latent.shape[0] != batch.decodes:
        raise ValueError(f"q_latent has {q_latent.shape[0]} rows, the batch has {batch.decodes} decodes")
    queries = batch.group_max if batch.groups is not None else 1
    return attend(fixed, q_latent, q_rope, cache, batch, scale, queries=queries, decode=True)


def attend(
    fixed: bool,
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    *,
    queries: int,
    decode: bool,
) -> Tensor:
    """The decode rows, or the others: q_latent [t, h, rank], q_rope [t, h, rope] -> [t, h, rank]."""
    tokens, heads, rank = q_latent.shape
    check_axes("q_rope", q_rope, 3)
    rope = q_rope.shape[2]
    entry = entry_of(cache, rank, rope)
    dtype = torch.bfloat16 if entry.group else cache.dtype
    check("q_latent", q_latent, cache, (tokens, heads, rank), dtype)
    check("q_rope", q_rope, cache, (tokens, heads, rope), dtype)
    out = torch.empty((tokens, heads, rank), dtype=dtype, device=cache.device)
    if tokens == 0:
        return out
    tiling = tiling_of(heads, queries, cache.dtype, fixed=fixed)
    work = work_of(batch, tiling, decode=decode)
    _launch(q_latent, q_rope, entry, cache.shape[1], batch, work, tiling, out, scale * LOG2_E.value)
    return out


def _launch(
    q_latent: Tensor,
    q_rope: Tensor,
    entry: Entry,
    page: int,
    batch: AttentionBatch,
    work: Work,
    tiling: Tiling,
    out: Tensor,
    scale: float,
) -> None:
    _, heads, rank = q_latent.shape
    rank_p = max(16, triton.next_power_of_2(rank))
    scratch, sums = work.scratch(tiling.block_m, rank_p)
    mla_kernels.attend[(work.parts,)](
        q_latent,
        q_rope,
        entry.latents,
        entry.ropes,
        entry.factors,
        batch.block_table,
        out,
        scratch,
        sums,
        *work.arrays,
        batch.block_table.stride(0),
        *q_latent.stride()[:2],
        *q_rope.stride()[:2],
        scale,
        HEADS=heads,
        RANK=rank,
        ROPE=q_rope.shape[2],
        RANK_P=rank_p,
        ROPE_P=max(16, triton.next_power_of_2(q_rope.shape[2])),
        LATENT_ROW=entry.latent_row,
        ROPE_ROW=entry.rope_row,
        FACTOR_ROW=entry.factor_row,
        GROUP=entry.group,
        PAGE=page,
        BLOCK_M=tiling.block_m,
        BLOCK_N=tiling.block_n,
        FIXED=tiling.fixed,
        SPLIT=work.split,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    launch_merge(scratch, sums, out, work, tiling, rank)


def launch_merge(scratch: Tensor, sums: Tensor, out: Tensor, work: Work, tiling: Tiling, width: int) -> None:
    """Add what the pieces of cut units left, into `out` [t, h, width]."""
    width_p = scratch.shape[1]
    block_w = min(MERGE_WIDTH, width_p)
    merge[(work.units if tiling.fixed else work.parts, tiling.block_m, width_p // block_w)](
        scratch,
        sums,
        out,
        work.first,
        work.lengths,
        work.segment,
        work.tile,
        work.cum,
        work.share,
        work.units,
        out.stride(0),
        out.stride(1),
        ROWS=tiling.rows,
        WIDTH=width,
        BLOCK_M=tiling.block_m,
        BLOCK_W=block_w,
        WIDTH_P=width_p,
        PIECES=MERGE_PIECES,
        FIXED=tiling.fixed,
        num_warps=4,
    )

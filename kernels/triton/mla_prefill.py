"""Latent attention of prompts: short pieces attend over the latents, long ones over keys and values projected up.

Up to `absorbed_tokens_max` tokens of a row the latents are cheaper: for DeepSeek-V3's sizes up to 170, the more the
longer the cached prefix is.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from tokenrelay.kernels import ops
from tokenrelay.kernels.batch import AttentionBatch
from tokenrelay.kernels.layout import absorbed_tokens_max
from tokenrelay.kernels.ref import fp8
from tokenrelay.kernels.triton import dense_kernels
from tokenrelay.kernels.triton.checks import check, check_axes, check_dense
from tokenrelay.kernels.triton.language import INTERPRET, LOG2_E
from tokenrelay.kernels.triton.mla import attend

STRETCH_BYTES = 512 << 20  # of keys and values that are projected up at once
_FULL = (128, 64, 8, 3)  # block_m, block_n, warps, stages: [128, 192] queries and three stages take 170 KB
_FLOAT32 = (32, 32, 4, 2)


@dataclass(frozen=True, slots=True)
class _Run:
    """Rows side by side that are computed in one way."""

    span: slice  # of the call's tokens
    rows: tuple[int, int]
    batch: AttentionBatch | None  # of short rows alone; None: one long row
    start: int
    length: int


_last: tuple[AttentionBatch | None, object, list[_Run]] = (None, None, [])


def _runs(batch: AttentionBatch, sizes: tuple[int, int, int], absorbed_tokens: int | None) -> list[_Run]:
    """How the rows are computed; `sizes`: rank, nope, value. All layers of a step pass the same batch: it is found
    once.

    Without the batch's `extents` this waits for the device, once a step.
    """
    global _last
    if _last[0] is batch and _last[1] == (sizes, absorbed_tokens):
        return _last[2]
    extents = batch.extents
    if extents is None:
        extents = tuple(zip(batch.starts.tolist(), batch.lengths.tolist(), strict=True))

    def absorbs(start: int, length: int) -> bool:
        return length <= (absorbed_tokens_max(*sizes, start) if absorbed_tokens is None else absorbed_tokens)

    runs: list[_Run] = []
    row, rows, first = batch.decodes, len(extents), 0
    while row < rows:
        last, tokens = row, 0
        while last < rows and absorbs(*extents[last]):
            tokens += extents[last][1]
            last += 1
        if last == row:
            start, length = extents[row]
            runs.append(_Run(slice(first, first + length), (row, row + 1), None, start, length))
            first, row = first + length, row + 1
            continue
        part = dataclasses.replace(
            batch,
            slots=batch.slots[row:last],
            starts=batch.starts[row:last],
            lengths=batch.lengths[row:last],
            offsets=batch.offsets[row : last + 1] - batch.offsets[row],
            positions=batch.positions[batch.decodes + first : batch.decodes + first + tokens],
            decodes=0,
        )
        runs.append(_Run(slice(first, first + tokens), (row, last), part, 0, tokens))
        first, row = first + tokens, last
    _last = (batch, (sizes, absorbed_tokens), runs)
    return runs


def mla_prefill(
    fixed: bool,
    q_nope: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    batch: AttentionBatch,
    w_uk: Tensor,
    w_uv: Tensor,
    scale: float,
    packed: object = None,
    *,
    absorbed_tokens: int | None = None,
) -> Tensor:
    """See `ops.mla_prefill`. `fixed`: over latents always, cut at fixed places, with the bits of `mla_decode`."""
    check_axes("q_nope", q_nope, 3)
    check_axes("w_uv", w_uv, 3)
    (tokens, heads, nope), (_, value, rank) = q_nope.shape, w_uv.shape
    expected = batch.positions.shape[0] - batch.decodes
    if tokens != expected:
        raise ValueError(f"q_nope has {tokens} tokens, the batch has {expected} prefill tokens")
    check("q_nope", q_nope, w_uk, (tokens, heads, nope))
    check_dense("w_uk", w_uk, q_nope, (heads, nope, rank))
    check_dense("w_uv", w_uv, q_nope, (heads, value, rank))
    out = torch.empty((tokens, heads, value), dtype=q_nope.dtype, device=q_nope.device)
    if tokens == 0:
        return out
    if fixed:
        return _absorbed(True, q_nope, q_rope, cache, batch, w_uk, w_uv, scale)
    for run in _runs(batch, (rank, nope, value), absorbed_tokens):
        span = run.span
        if run.batch is not None:
            part = _absorbed(False, q_nope[span], q_rope[span], cache, run.batch, w_uk, w_uv, scale)
            out[span] = part
        else:
            _projected(q_nope[span], q_rope[span], cache, batch, run, w_uk, w_uv, scale, out[span])
    return out


def _absorbed(
    fixed: bool,
    q_nope: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    batch: AttentionBatch,
    w_uk: Tensor,
    w_uv: Tensor,
    scale: float,
) -> Tensor:
    q_latent = ops.mla_absorb(q_nope, w_uk)
    latent = attend(fixed, q_latent, q_rope, cache, batch, scale, queries=q_nope.shape[0], decode=False)
    return ops.mla_expand(latent, w_uv)


def _projected(
    q_nope: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    batch: AttentionBatch,
    run: _Run,
    w_uk: Tensor,
    w_uv: Tensor,
    scale: float,
    out: Tensor,
) -> None:
    """One row: stretches of its context are projected up by torch's matrix product, and attended to as usual heads."""
    (tokens, heads, nope), (_, value, rank) = q_nope.shape, w_uv.shape
    page, context = cache.shape[1], run.start + run.length
    blocks = batch.block_table.index_select(0, batch.slots[run.rows[0] : run.rows[1]].long())[0].long()
    stretch = max(1, STRETCH_BYTES // (heads * (nope + value) * q_nope.element_size()) // page) * page
    rope = q_rope.shape[2]
    shape = _FULL if q_nope.element_size() == 2 else _FLOAT32
    block_m, block_n, warps, stages = (32, 32, 4, 2) if INTERPRET.value else shape
    value_p = max(16, triton.next_power_of_2(value))
    state = torch.empty((heads, tokens, value_p), dtype=torch.float32, device=out.device)
    sums = torch.empty((heads, tokens, 2), dtype=torch.float32, device=out.device)
    for first in range(0, context, stretch):
        count = min(stretch, context - first)
        entries = cache[blocks[first // page : -(-(first + count) // page)]].flatten(0, 1)[:count]
        if cache.dtype is torch.float8_e4m3fn:
            entries = fp8.decode(entries, rank).to(q_nope.dtype)
        keys = entries[:, :rank] @ w_uk.view(heads * nope, rank).T  # [c, h * nope]
        values = entries[:, :rank] @ w_uv.view(heads * value, rank).T  # [c, h * v]
        ropes = entries[:, rank:]
        dense_kernels.attend[(triton.cdiv(tokens, block_m), heads)](
            q_nope,
            q_rope,
            keys,
            ropes,
            values,
            out,
            state,
            sums,
            tokens,
            run.start,
            first,
            count,
            *q_nope.stride()[:2],
            *q_rope.stride()[:2],
            ropes.stride(0),
            *out.stride()[:2],
            scale * LOG2_E.value,
            HEADS=heads,
            NOPE=nope,
            ROPE=rope,
            VALUE=value,
            NOPE_P=max(16, triton.next_power_of_2(nope)),
            ROPE_P=max(16, triton.next_power_of_2(rope)),
            VALUE_P=value_p,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            FIRST=first == 0,
            LAST=first + count == context,
            num_warps=warps,
            num_stages=stages,
        )

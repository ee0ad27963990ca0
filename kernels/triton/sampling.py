"""Choosing tokens on the device: launches. Nothing here waits for it."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from tokenrelay.kernels.batch import PenaltyBatch, SamplingBatch
from tokenrelay.kernels.triton import sampling_kernels as kernels
from tokenrelay.kernels.triton.checks import check, check_axes, check_dense

CHUNK = 4096  # tokens of one program
BLOCK = 1024  # tokens at a time of the search for a cut: eight sums of each stay in registers
WEIGHT_ONE = float(1 << 42)


def sample(logits: Tensor, params: SamplingBatch) -> Tensor:
    """See `ops.sample`."""
    check_axes("logits", logits, 2)
    rows, vocab = logits.shape
    check("logits", logits, logits, (rows, vocab), torch.float32)
    if vocab == 0:
        raise ValueError("logits has an empty vocabulary")
    for name, dtype in (
        ("temperature", torch.float32),
        ("top_p", torch.float32),
        ("top_k", torch.int32),
        ("min_p", torch.float32),
        ("seed", torch.int64),
        ("choice", torch.int32),
        ("position", torch.int64),
    ):
        check_dense(name, getattr(params, name), logits, (rows,), dtype)
    device = logits.device
    out = torch.empty(rows, dtype=torch.int64, device=device)
    if rows == 0:
        return out
    chunks = triton.cdiv(vocab, CHUNK)
    chunks_p = triton.next_power_of_2(chunks)
    tops = torch.empty((rows, chunks), dtype=torch.float32, device=device)
    ids = torch.empty((rows, chunks), dtype=torch.int32, device=device)
    weights = torch.empty((rows, vocab), dtype=torch.int64, device=device)
    totals = torch.empty((rows, chunks), dtype=torch.int64, device=device)
    inverses = 1.0 / params.temperature.double()
    floors = (params.min_p.clamp(0.0, 1.0).double() * WEIGHT_ONE).long()
    sizes = (vocab, logits.stride(0), chunks)
    kernels.largest[(rows, chunks)](logits, tops, ids, *sizes, CHUNK=CHUNK, num_warps=8)
    kernels.weigh[(rows, chunks)](
        logits,
        params.temperature,
        inverses,
        floors,
        tops,
        weights,
        totals,
        *sizes,
        CHUNK=CHUNK,
        CHUNKS_P=chunks_p,
        num_warps=8,
        enable_fp_fusion=False,
    )
    kernels.choose[(rows,)](
        logits,
        params.temperature,
        params.top_p,
        params.top_k,
        params.seed,
        params.choice,
        params.position,
        tops,
        ids,
        weights,
        totals,
        out,
        *sizes,
        CHUNK=CHUNK,
        CHUNKS_P=chunks_p,
        BLOCK=BLOCK,
        num_warps=8,
        enable_fp_fusion=False,
    )
    return out


def apply_penalties(logits: Tensor, penalties: PenaltyBatch) -> None:
    """See `ops.apply_penalties`. A token outside the vocabulary is passed over: waiting for the device costs more."""
    check_axes("logits", logits, 2)
    check("logits", logits, logits, tuple(logits.shape), torch.float32)
    count, seen, biases = penalties.rows.shape[0], penalties.token_ids.shape[0], penalties.bias.shape[0]
    for name, shape, dtype in (
        ("rows", count, torch.int64),
        ("presence", count, torch.float32),
        ("frequency", count, torch.float32),
        ("repetition", count, torch.float32),
        ("offsets", count + 1, torch.int64),
        ("token_ids", seen, torch.int64),
        ("output_counts", seen, torch.int32),
        ("bias_offsets", count + 1, torch.int64),
        ("bias_token_ids", biases, torch.int64),
        ("bias", biases, torch.float32),
    ):
        check_dense(name, getattr(penalties, name), logits, (shape,), dtype)
    if count:
        kernels.penalize[(count,)](
            logits,
            penalties.rows,
            penalties.presence,
            penalties.frequency,
            penalties.repetition,
            penalties.offsets,
            penalties.token_ids,
            penalties.output_counts,
            penalties.bias_offsets,
            penalties.bias_token_ids,
            penalties.bias,
            logits.shape[1],
            logits.stride(0),
            BLOCK=1024,
            num_warps=4,
            enable_fp_fusion=False,
        )

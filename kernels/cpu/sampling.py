"""Choosing tokens on the CPU."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import tokenrelay.kernels._cpu as _native
from tokenrelay.kernels.batch import PenaltyBatch, SamplingBatch
from tokenrelay.kernels.cpu.variants import Variant, check, check_axes, check_dense
from tokenrelay.kernels.registry import Limit, register

_VOCAB = Limit(1, 1 << 20)  # the sum of so many weights of at most 2^42 fits 63 bits


def register_variant(variant: Variant) -> None:
    """Register every operation of this file for one set of inner loops."""
    if variant.pairs:
        return  # nothing here multiplies pairs
    for op, call in (("sample", sample), ("token_logprobs", token_logprobs)):
        add = register(
            op=op,
            path=variant.path,
            isa=variant.isa,
            dtypes=("float32",),
            limits={"vocab": _VOCAB},
            priority=variant.priority,
        )
        add(functools.partial(call, variant.code))
    if variant.code == 0:  # few elements: one for all
        register(op="apply_penalties", path=variant.path, dtypes=("float32",))(apply_penalties)
        register(op="finite_rows", path=variant.path, dtypes=("float32",))(finite_rows)


def _check_logits(logits: Tensor) -> tuple[int, int]:
    check_axes("logits", logits, 2)
    rows, vocab = logits.shape
    check("logits", logits, torch.float32, (rows, vocab))
    return rows, vocab


def sample(isa: int, logits: Tensor, params: SamplingBatch) -> Tensor:
    """See `ops.sample`."""
    rows, vocab = _check_logits(logits)
    if vocab == 0:
        raise ValueError("logits has an empty vocabulary")
    check_dense("temperature", params.temperature, torch.float32, (rows,))
    check_dense("top_p", params.top_p, torch.float32, (rows,))
    check_dense("top_k", params.top_k, torch.int32, (rows,))
    check_dense("min_p", params.min_p, torch.float32, (rows,))
    check_dense("seed", params.seed, torch.int64, (rows,))
    check_dense("choice", params.choice, torch.int32, (rows,))
    check_dense("position", params.position, torch.int64, (rows,))
    tokens = torch.empty(rows, dtype=torch.int64)
    _native.sample(
        isa,
        rows,
        vocab,
        logits.data_ptr(),
        logits.stride(0),
        params.temperature.data_ptr(),
        params.top_p.data_ptr(),
        params.top_k.data_ptr(),
        params.min_p.data_ptr(),
        params.seed.data_ptr(),
        params.choice.data_ptr(),
        params.position.data_ptr(),
        tokens.data_ptr(),
    )
    return tokens


def token_logprobs(isa: int, logits: Tensor, token_ids: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.token_logprobs`."""
    rows, vocab = _check_logits(logits)
    if not 0 <= top_k <= vocab:
        raise ValueError(f"top_k is {top_k}, expected 0 to {vocab}")
    check_dense("token_ids", token_ids, torch.int64, (rows,))
    chosen = torch.empty(rows, dtype=torch.float32)
    top_ids = torch.empty(rows, top_k, dtype=torch.int64)
    top = torch.empty(rows, top_k, dtype=torch.float32)
    _native.token_logprobs(
        isa,
        rows,
        vocab,
        top_k,
        logits.data_ptr(),
        logits.stride(0),
        token_ids.data_ptr(),
        chosen.data_ptr(),
        top.data_ptr(),
        top_ids.data_ptr(),
    )
    return chosen, top_ids, top


def apply_penalties(logits: Tensor, penalties: PenaltyBatch) -> None:
    """See `ops.apply_penalties`."""
    rows, vocab = _check_logits(logits)
    count, seen, biases = penalties.rows.shape[0], penalties.token_ids.shape[0], penalties.bias.shape[0]
    check_dense("rows", penalties.rows, torch.int64, (count,))
    check_dense("presence", penalties.presence, torch.float32, (count,))
    check_dense("frequency", penalties.frequency, torch.float32, (count,))
    check_dense("repetition", penalties.repetition, torch.float32, (count,))
    check_dense("offsets", penalties.offsets, torch.int64, (count + 1,))
    check_dense("token_ids", penalties.token_ids, torch.int64, (seen,))
    check_dense("output_counts", penalties.output_counts, torch.int32, (seen,))
    check_dense("bias_offsets", penalties.bias_offsets, torch.int64, (count + 1,))
    check_dense("bias_token_ids", penalties.bias_token_ids, torch.int64, (biases,))
    check_dense("bias", penalties.bias, torch.float32, (biases,))
    _native.apply_penalties(
        rows,
        vocab,
        logits.data_ptr(),
        logits.stride(0),
        count,
        penalties.rows.data_ptr(),
        penalties.presence.data_ptr(),
        penalties.frequency.data_ptr(),
        penalties.repetition.data_ptr(),
        penalties.offsets.data_ptr(),
        penalties.token_ids.data_ptr(),
        seen,
        penalties.output_counts.data_ptr(),
        penalties.bias_offsets.data_ptr(),
        penalties.bias_token_ids.data_ptr(),
        biases,
        penalties.bias.data_ptr(),
    )


def finite_rows(logits: Tensor) -> Tensor:
    """See `ops.finite_rows`."""
    check_axes("logits", logits, 2)
    rows, vocab = logits.shape
    check("logits", logits, torch.float32, (rows, vocab))
    finite = torch.empty(rows, dtype=torch.bool)
    _native.finite_rows(rows, vocab, logits.data_ptr(), logits.stride(0), finite.data_ptr())
    return finite

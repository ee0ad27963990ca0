"""Choosing tokens. Every implementation gives the same token for the same logits, bit for bit:

- random numbers are Philox-4x32-10 (Salmon et al. 2011), keyed by the seed, counted by (position, choice);
- a token's weight is a whole number, floor(2^42 * exp((logit - max) / temperature)), with exp spelled out in float64
  additions and multiplications below, so that every machine computes the same one;
- sums of whole numbers do not depend on their order, and the token is found in the order of token ids.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenrelay.kernels.batch import PenaltyBatch, SamplingBatch
from tokenrelay.kernels.ref.elementwise import accumulate
from tokenrelay.kernels.registry import register

WEIGHT_ONE = 1 << 42  # the weight of the most likely token; 2^20 tokens of it still fit 63 bits
_EXP_TERMS = 12  # of the Taylor series on |r| <= ln(2) / 2: an error below 1e-14
_LN2_HIGH = 0.693147180369123816490  # ln(2) in two parts, the first with trailing zero bits so that n * high is exact
_LN2_LOW = 1.90821492927058770002e-10
_LOG2_E = 1.44269504088896338700
_MASK32 = 0xFFFFFFFF


@register(op="sample", path="ref/torch", device="any", priority=0)
def sample(logits: Tensor, params: SamplingBatch) -> Tensor:
    """See `ops.sample`."""
    lowest, highest = torch.finfo(logits.dtype).min, torch.finfo(logits.dtype).max
    clean = logits.nan_to_num(nan=-math.inf, posinf=highest, neginf=-math.inf)
    tokens = clean.argmax(dim=-1)  # the lowest id among equals, as max over (value, -id)
    tokens = torch.where(clean.amax(-1) < lowest, 0, _first_max(clean, tokens))
    random = philox(params.seed, params.choice, params.position)
    for row in (params.temperature > 0).nonzero().flatten().tolist():
        if clean[row].max() >= lowest:  # else nothing is possible, and token 0 stands
            tokens[row] = _sample_row(clean[row], params, row, random[row])
    return tokens


def _first_max(x: Tensor, fallback: Tensor) -> Tensor:
    if x.shape[0] == 0:
        return fallback
    ids = torch.arange(x.shape[-1], device=x.device)
    return torch.where(x == x.amax(-1, keepdim=True), ids, x.shape[-1]).amin(-1)


def _sample_row(logits: Tensor, params: SamplingBatch, row: int, random: int) -> int:
    weights = token_weights(logits, float(params.temperature[row]))
    min_p = min(float(params.min_p[row]), 1.0)
    if min_p > 0:
        weights = weights.where(weights >= int(min_p * WEIGHT_ONE), 0)
    order = torch.sort(logits, descending=True, stable=True).indices  # the lower id first among equals
    top_k = int(params.top_k[row])
    if 0 < top_k < logits.shape[0]:
        weights[order[top_k:]] = 0
    top_p = float(params.top_p[row])
    if top_p < 1:
        bound = int(max(top_p, 0.0) * float(int(weights.sum())))
        before = weights[order].cumsum(0) - weights[order]  # the weight of all likelier tokens
        outside = before >= bound
        outside[0] = False  # the likeliest token stays whatever top_p is
        weights[order[outside]] = 0
    cumulative = weights.cumsum(0)
    target = random * int(cumulative[-1]) >> 64  # in [0, total)
    return int(torch.searchsorted(cumulative, target, right=True))


def token_weights(logits: Tensor, temperature: float) -> Tensor:
    """int64 weights of a row without NaN whose maximum is finite: WEIGHT_ONE for the maximum, 0 below about 2^-42."""
    wide = logits.double()
    x = ((wide - wide.max()) * (1.0 / temperature)).clamp(min=-100.0)
    n = torch.round(x * _LOG2_E)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    series = torch.full_like(r, 1.0 / math.factorial(_EXP_TERMS - 1))
    for term in range(_EXP_TERMS - 2, -1, -1):
        series = series * r + 1.0 / math.factorial(term)
    power = ((n.long() + 1023) << 52).view(torch.float64)  # 2^n by its bits
    return (series * power * float(WEIGHT_ONE)).long()


def philox(seed: Tensor, choice: Tensor, position: Tensor) -> list[int]:
    """One 64-bit random number per row: Philox-4x32-10 with the seed as key and the counter
    (position low, position high, choice, 0); words 0 (low) and 1 (high) of its output."""
    key0, key1 = seed & _MASK32, (seed >> 32) & _MASK32
    c0, c1 = position & _MASK32, (position >> 32) & _MASK32
    c2, c3 = choice.long() & _MASK32, torch.zeros_like(position)
    for _ in range(10):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & _MASK32, (key1 + 0xBB67AE85) & _MASK32
    return [low | high << 32 for low, high in zip(c0.tolist(), c1.tolist(), strict=True)]


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low halves of a 32 x 32 bit product; it wraps in int64, its bits do not."""
    product = a * b
    return (product >> 32) & _MASK32, product & _MASK32


@register(op="token_logprobs", path="ref/torch", device="any", priority=0)
def token_logprobs(logits: Tensor, token_ids: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.token_logprobs`."""
    logprobs = torch.log_softmax(accumulate(logits), dim=-1)
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :top_k]
    chosen = logprobs.gather(-1, token_ids.long().unsqueeze(-1)).squeeze(-1)
    return chosen, order, logprobs.gather(-1, order)


@register(op="apply_penalties", path="ref/torch", device="any", priority=0)
def apply_penalties(logits: Tensor, penalties: PenaltyBatch) -> None:
    """See `ops.apply_penalties`."""
    offsets, bias_offsets = penalties.offsets.tolist(), penalties.bias_offsets.tolist()
    for index, row in enumerate(penalties.rows.tolist()):
        seen = slice(offsets[index], offsets[index + 1])
        ids, counts = penalties.token_ids[seen], penalties.output_counts[seen]
        values = logits[row, ids]
        repetition = penalties.repetition[index]
        values = torch.where(values > 0, values / repetition, values * repetition)
        values = values - penalties.frequency[index] * counts - penalties.presence[index] * (counts > 0)
        logits[row, ids] = values.to(logits.dtype)
        biased = slice(bias_offsets[index], bias_offsets[index + 1])
        ids = penalties.bias_token_ids[biased]
        logits[row, ids] = logits[row, ids] + penalties.bias[biased].to(logits.dtype)


@register(op="finite_rows", path="ref/torch", device="any", priority=0)
def finite_rows(logits: Tensor) -> Tensor:
    """See `ops.finite_rows`."""
    return torch.isfinite(logits).all(dim=-1)

"""Mixture of experts: routing and the experts' feed-forward network."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokenrelay.kernels.packed import PackedWeight
from tokenrelay.kernels.quantized import QuantizedWeight
from tokenrelay.kernels.ref.elementwise import accumulate
from tokenrelay.kernels.registry import register
from tokenrelay.kernels.scaled import BlockScaledWeight

NO_EXPERT = -1  # in `experts`: the choice lives on another rank


@register(op="moe", path="ref/torch", device="any", priority=0, invariant=False)
def moe(x: Tensor, experts: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """See `ops.moe`."""
    wide = accumulate(x)  # [t, d]
    out = torch.zeros_like(wide)
    for expert in sorted({*experts.flatten().tolist()} - {NO_EXPERT}):
        token, choice = (experts == expert).nonzero(as_tuple=True)
        gate, up = (wide[token] @ accumulate(w_gate_up[expert]).T).chunk(2, dim=-1)
        down = (torch.nn.functional.silu(gate) * up) @ accumulate(w_down[expert]).T
        out.index_add_(0, token, down * weights[token, choice, None].to(wide.dtype))
    return out.to(x.dtype)


@register(op="quantized_moe", path="ref/torch", device="any", priority=0, invariant=False)
def quantized_moe(
    x: Tensor, experts: Tensor, weights: Tensor, w_gate_up: QuantizedWeight, w_down: QuantizedWeight
) -> Tensor:
    """See `ops.quantized_moe`; activations stay as they are."""
    return moe(x.float(), experts, weights, w_gate_up.dequantize(), w_down.dequantize()).to(x.dtype)


@register(op="packed_moe", path="ref/torch", device="any", priority=0, invariant=False)
def packed_moe(x: Tensor, experts: Tensor, weights: Tensor, w_gate_up: PackedWeight, w_down: PackedWeight) -> Tensor:
    """See `ops.packed_moe`; activations stay as they are."""
    return moe(x.float(), experts, weights, w_gate_up.unpack().float(), w_down.unpack().float()).to(x.dtype)


@register(op="scaled_moe", path="ref/torch", device="any", priority=0, invariant=False)
def scaled_moe(
    x: Tensor, experts: Tensor, weights: Tensor, w_gate_up: BlockScaledWeight, w_down: BlockScaledWeight
) -> Tensor:
    """See `ops.scaled_moe`; activations stay as they are."""
    return moe(x.float(), experts, weights, w_gate_up.dequantize(), w_down.dequantize()).to(x.dtype)


@register(op="moe_route", path="ref/torch", device="any", priority=0)
def moe_route(
    logits: Tensor,
    bias: Tensor | None,
    *,
    top_k: int,
    groups: int,
    groups_top_k: int,
    scoring: Literal["softmax", "sigmoid"],
    normalize: bool,
    scale: float,
    group_score: Literal["max", "top2"],
) -> tuple[Tensor, Tensor]:
    """See `ops.moe_route`."""
    wide = accumulate(logits)  # [t, E]
    scores = torch.softmax(wide, dim=-1) if scoring == "softmax" else torch.sigmoid(wide)
    ranked = scores if bias is None else scores + bias  # what experts are chosen by; weights come from `scores`
    if groups > 1:
        grouped = ranked.reshape(ranked.shape[0], groups, ranked.shape[1] // groups)  # [t, groups, E / groups]
        best = grouped.amax(-1) if group_score == "max" else grouped.topk(2, dim=-1).values.sum(-1)
        chosen_groups = _top(best, groups_top_k)  # [t, groups_top_k]
        closed = torch.ones_like(best, dtype=torch.bool).scatter(-1, chosen_groups, False)
        ranked = grouped.masked_fill(closed.unsqueeze(-1), float("-inf")).flatten(-2)
    experts = _top(ranked, top_k)
    weights = scores.gather(-1, experts)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return experts.to(torch.int32), weights * scale


def _top(x: Tensor, k: int) -> Tensor:
    """Indices of the k largest, largest first, the lower index first among equals (torch.topk promises no order)."""
    return torch.sort(x, dim=-1, descending=True, stable=True).indices[..., :k]

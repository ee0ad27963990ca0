"""Mixture of experts on the CPU: the chosen experts' products, each expert's tokens together."""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor

import tokenrelay.kernels._cpu as _native
from tokenrelay.kernels.cpu.variants import FLOATS, Variant, check, check_axes, check_dense, code_of
from tokenrelay.kernels.registry import register


def register_variant(variant: Variant) -> None:
    """Register every operation of this file for one set of inner loops."""
    dtypes = ("bfloat16",) if variant.pairs else FLOATS
    register(op="moe", path=variant.path, isa=variant.isa, dtypes=dtypes, priority=variant.priority)(
        functools.partial(moe, variant.code)
    )
    if not variant.pairs:
        register(op="moe_route", path=variant.path, isa=variant.isa, dtypes=("float32",), priority=variant.priority)(
            functools.partial(moe_route, variant.code)
        )


def moe(
    isa: int,
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
) -> Tensor:
    """See `ops.moe`."""
    check_axes("x", x, 2)
    check_axes("experts", experts, 2)
    check_axes("w_down", w_down, 3)
    code = code_of("x", x)
    (tokens, width), top_k = x.shape, experts.shape[1]
    count, _, hidden = w_down.shape
    check("x", x, x.dtype, (tokens, width))
    check_dense("experts", experts, torch.int32, (tokens, top_k))
    check_dense("weights", weights, torch.float32, (tokens, top_k))
    check_dense("w_gate_up", w_gate_up, x.dtype, (count, 2 * hidden, width))
    check_dense("w_down", w_down, x.dtype, (count, width, hidden))
    out = torch.empty(tokens, width, dtype=x.dtype)
    _native.moe(
        isa,
        code,
        tokens,
        top_k,
        count,
        width,
        hidden,
        x.data_ptr(),
        x.stride(0),
        experts.data_ptr(),
        weights.data_ptr(),
        w_gate_up.data_ptr(),
        w_down.data_ptr(),
        out.data_ptr(),
    )
    return out


def moe_route(
    isa: int,
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
    check_axes("logits", logits, 2)
    tokens, count = logits.shape
    check("logits", logits, torch.float32, (tokens, count))
    if bias is not None:
        check_dense("bias", bias, torch.float32, (count,))
    if scoring not in ("softmax", "sigmoid") or group_score not in ("max", "top2"):
        raise ValueError(f"scoring {scoring!r} or group_score {group_score!r} is unknown")
    experts = torch.empty(tokens, top_k, dtype=torch.int32)
    weights = torch.empty(tokens, top_k, dtype=torch.float32)
    _native.moe_route(
        isa,
        tokens,
        count,
        logits.data_ptr(),
        logits.stride(0),
        0 if bias is None else bias.data_ptr(),
        top_k,
        groups,
        groups_top_k,
        scoring == "sigmoid",
        normalize,
        group_score == "top2",
        scale,
        experts.data_ptr(),
        weights.data_ptr(),
    )
    return experts, weights

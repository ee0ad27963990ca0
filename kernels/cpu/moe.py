"""Mixture of experts on the CPU: our own product for few tokens an expert, torch's for many."""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor

import tokenrelay.kernels._cpu as _native
from tokenrelay.kernels.cpu.variants import FLOATS, Variant, check, check_axes, check_dense, code_of
from tokenrelay.kernels.registry import register

# From this many choices an expert on average, torch's matrix product is faster than ours (docs/kernels.md).
_TORCH_ROWS = 64


def register_variant(variant: Variant) -> None:
    """Register every operation of this file for one set of inner loops."""
    dtypes = ("bfloat16",) if variant.pairs else FLOATS
    moe_call = functools.partial(moe, variant.code)
    register(op="moe", path=variant.path, isa=variant.isa, dtypes=dtypes, priority=variant.priority)(moe_call)
    # Rows that depend on their own inputs only, whatever the batch: for deterministic serving.
    register(op="moe", path=f"{variant.path}/rows", isa=variant.isa, dtypes=dtypes, priority=variant.priority - 5)(
        functools.partial(moe, variant.code, torch_rows=1 << 62)
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
    *,
    torch_rows: int = _TORCH_ROWS,
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
    if tokens * top_k >= torch_rows * count:
        return _grouped_by_torch(x, experts, weights, w_gate_up, w_down)
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


def _grouped_by_torch(x: Tensor, experts: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """Each expert's tokens in one matrix product; sums in float32, experts ascending."""
    from tokenrelay.kernels.ops import silu_mul

    order = experts.flatten().argsort(stable=True)
    counts = torch.bincount(experts.flatten()[order].clamp(min=-1) + 1, minlength=w_down.shape[0] + 1).tolist()
    if len(counts) > w_down.shape[0] + 1 or int(experts.min()) < -1:
        raise ValueError(f"experts must be -1 to {w_down.shape[0] - 1}")
    out = torch.zeros(x.shape, dtype=torch.float32)
    first = counts[0]  # those without an expert come first
    for expert, count in enumerate(counts[1:]):
        if count == 0:
            continue
        chosen = order[first : first + count]
        token = chosen // experts.shape[1]
        hidden = silu_mul(x[token] @ w_gate_up[expert].T)
        down = (hidden @ w_down[expert].T).float()
        out.index_add_(0, token, down * weights.flatten()[chosen, None])
        first += count
    return out.to(x.dtype)


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

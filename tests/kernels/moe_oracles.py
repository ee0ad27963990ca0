"""Routing and experts in float64, token by token, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROUTES: list[dict[str, Any]] = [
    {"top_k": 2, "groups": 1, "groups_top_k": 1, "scoring": "softmax", "normalize": True},  # Qwen3-MoE
    {"top_k": 6, "groups": 4, "groups_top_k": 2, "scoring": "softmax", "normalize": False, "scale": 16.0},  # V2
    {
        "top_k": 8,
        "groups": 8,
        "groups_top_k": 4,
        "scoring": "sigmoid",
        "normalize": True,
        "scale": 2.5,
        "group_score": "top2",
    },
    {"top_k": 1, "groups": 1, "groups_top_k": 1, "scoring": "sigmoid", "normalize": True},
]


def route_oracle(
    logits: Tensor, bias: Tensor | None, options: dict[str, Any]
) -> tuple[list[list[int]], list[list[float]]]:
    """By sorting Python numbers."""
    chosen, weights = [], []
    for row in logits.double():
        score = row.exp() / row.exp().sum() if options["scoring"] == "softmax" else 1 / (1 + (-row).exp())
        ranked = (score if bias is None else score + bias.double()).tolist()
        size = len(ranked) // options["groups"]
        groups = [ranked[g * size : (g + 1) * size] for g in range(options["groups"])]
        best = 2 if options.get("group_score") == "top2" else 1
        values = [sum(sorted(group)[-best:]) for group in groups]
        open_groups = sorted(range(len(groups)), key=lambda g: (-values[g], g))[: options["groups_top_k"]]
        allowed = [e for e in range(len(ranked)) if e // size in open_groups]
        experts = sorted(allowed, key=lambda e: (-ranked[e], e))[: options["top_k"]]
        own = [float(score[e]) for e in experts]
        total = sum(own) + 1e-20 if options["normalize"] else 1.0
        chosen.append(experts)
        weights.append([w / total * options.get("scale", 1.0) for w in own])
    return chosen, weights


def moe_inputs(tokens: int, top_k: int, count: int, width: int, hidden: int, dtype: torch.dtype) -> list[Tensor]:
    x = torch.randn(tokens, width).to(dtype)
    experts = torch.stack([torch.randperm(count)[:top_k] for _ in range(tokens)]) if tokens else torch.empty(0, top_k)
    w_gate_up = (torch.randn(count, 2 * hidden, width) / width**0.5).to(dtype)
    w_down = (torch.randn(count, width, hidden) / hidden**0.5).to(dtype)
    return [x, experts.to(torch.int32), torch.rand(tokens, top_k), w_gate_up, w_down]


def moe_oracle(x: Tensor, experts: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(x.shape[0]):
        for choice in range(experts.shape[1]):
            expert = int(experts[token, choice])
            if expert >= 0:
                gate, up = (w_gate_up[expert].double() @ x[token].double()).chunk(2)
                hidden = gate / (1 + (-gate).exp()) * up
                out[token] += float(weights[token, choice]) * (w_down[expert].double() @ hidden)
    return out

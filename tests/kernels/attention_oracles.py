"""Paged attention in float64 over the unpaged contexts of a case, and inputs for it."""

from __future__ import annotations

import torch
from kernel_cases import Case, dense_attention
from torch import Tensor

from tokenrelay.kernels.layout import MlaLayout

SCALE = 0.13


def mla_decode_oracle(case: Case, q: Tensor, rank: int) -> Tensor:
    """q [n, h, rank + rope] against each row's latents."""
    out = []
    for row in range(case.batch.decodes):
        entries = case.contexts[row].expand(q.shape[1], -1, -1)
        out.append(
            dense_attention(q[row : row + 1].double(), entries, entries[..., :rank], entries.shape[1] - 1, SCALE)
        )
    return torch.cat(out) if out else torch.empty(0, q.shape[1], rank, dtype=torch.float64)


def prefill_inputs(
    case: Case, heads: int, nope: int, value: int, layout: MlaLayout, dtype: torch.dtype
) -> list[Tensor]:
    tokens = case.tokens - case.batch.decodes
    q = torch.randn(tokens, heads, nope + layout.rope).to(dtype)
    w_uk = (torch.randn(heads, nope, layout.rank) / layout.rank**0.5).to(dtype)
    w_uv = (torch.randn(heads, value, layout.rank) / layout.rank**0.5).to(dtype)
    return [q[..., :nope], q[..., nope:], w_uk, w_uv]


def mla_prefill_oracle(case: Case, inputs: list[Tensor], rank: int) -> Tensor:
    q_nope, q_rope, w_uk, w_uv = (x.double() for x in inputs)
    out = []
    for row in range(case.batch.decodes, case.rows):
        start, length, first = case.extent(row)
        latent, rope = case.contexts[row][:, :rank], case.contexts[row][:, rank:]
        keys = torch.cat((latent @ w_uk.transpose(1, 2), rope.expand(q_nope.shape[1], -1, -1)), dim=-1)
        tokens = slice(first - case.batch.decodes, first - case.batch.decodes + length)
        q = torch.cat((q_nope[tokens], q_rope[tokens]), dim=-1)
        out.append(dense_attention(q, keys, latent @ w_uv.transpose(1, 2), start, SCALE))
    return torch.cat(out)


def gqa_oracle(case: Case, q: Tensor, rows: range, base: int) -> Tensor:
    out = []
    for row in rows:
        start, length, first = case.extent(row)
        group = q.shape[1] // case.contexts[row].shape[1]
        k, v = case.contexts[row].repeat_interleave(group, dim=1)
        out.append(dense_attention(q[first - base : first - base + length].double(), k, v, start, SCALE))
    return torch.cat(out)

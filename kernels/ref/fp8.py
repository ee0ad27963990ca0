"""KV in float8, as `layout.MlaFp8Layout` and `GqaFp8Layout` lay it out: to and from it in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenrelay.kernels.layout import FACTOR_BYTES, fp8_group

E4M3_MAX = 448.0


def encode(latent: Tensor, rope: Tensor) -> Tensor:
    """latent [t, rank], rope [t, rope] -> float8_e4m3fn [t, bytes]; the largest latent of a group becomes 448."""
    tokens, rank = latent.shape
    grouped = latent.float().view(tokens, -1, fp8_group(rank))  # [t, groups, group]
    largest = grouped.abs().amax(-1)
    factors = torch.where(largest > 0, largest / E4M3_MAX, 1.0)  # [t, groups]
    small = (grouped / factors.unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(tokens, rank)
    parts = (small, factors, rope.to(torch.bfloat16))
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=-1).view(torch.float8_e4m3fn)


def decode(entries: Tensor, rank: int) -> Tensor:
    """float8_e4m3fn [t, bytes] -> float32 [t, rank + rope]."""
    group = fp8_group(rank)
    raw, head = entries.view(torch.uint8), rank + 4 * (rank // group)
    small, factors, rope = raw[:, :rank], raw[:, rank:head], raw[:, head:]
    wide = small.contiguous().view(torch.float8_e4m3fn).float().view(-1, rank // group, group)
    latent = (wide * factors.contiguous().view(torch.float32).unsqueeze(-1)).view(-1, rank)
    return torch.cat((latent, rope.contiguous().view(torch.bfloat16).float()), dim=-1)


def encode_heads(x: Tensor) -> Tensor:
    """x [..., hd] -> float8_e4m3fn [..., hd + 4]: its largest becomes 448, and its factor stands behind it."""
    wide = x.float()
    largest = wide.abs().amax(-1, keepdim=True)
    factors = torch.where(largest > 0, largest / E4M3_MAX, 1.0)
    small = (wide / factors).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return torch.cat((small.view(torch.uint8), factors.view(torch.uint8)), dim=-1).view(torch.float8_e4m3fn)


def decode_heads(entries: Tensor) -> Tensor:
    """float8_e4m3fn [..., hd + 4] -> float32 [..., hd]."""
    raw = entries.view(torch.uint8)
    small = raw[..., :-FACTOR_BYTES].contiguous().view(torch.float8_e4m3fn).float()
    return small * raw[..., -FACTOR_BYTES:].contiguous().view(torch.float32)

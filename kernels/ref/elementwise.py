"""Norms, rotary embedding, gated activation and cache writes. Arithmetic is in float32 at least."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenrelay.kernels import ops
from tokenrelay.kernels.ref import fp8
from tokenrelay.kernels.registry import PARTS, register


def accumulate(x: Tensor) -> Tensor:
    """`x` in the type that sums are kept in: float32, or float64 where x is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@register(op="rms_norm", path="ref/torch", device="any", priority=0)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `ops.rms_norm`."""
    wide = accumulate(x)  # [t, d]
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * scale * accumulate(weight)).to(x.dtype)


@register(op="add_rms_norm", path="ref/torch", device="any", priority=0)
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `ops.add_rms_norm`."""
    total = (accumulate(x) + accumulate(residual)).to(
        x.dtype
    )  # rounded first: the norm sees what the next layer adds to
    return rms_norm(total, weight, eps), total


@register(op="rotary", path="ref/torch", device="any", priority=0)
def rotary(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """See `ops.rotary`."""
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)  # [t, 1, r / 2] each
    return _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    wide = accumulate(x)  # [t, h, r]
    a, b = (wide[..., 0::2], wide[..., 1::2]) if interleaved else wide.chunk(2, dim=-1)
    first, second = a * cos - b * sin, b * cos + a * sin
    out = torch.stack((first, second), dim=-1).flatten(-2) if interleaved else torch.cat((first, second), dim=-1)
    return out.to(x.dtype)


@register(op="silu_mul", path="ref/torch", device="any", priority=0)
def silu_mul(gate_up: Tensor) -> Tensor:
    """See `ops.silu_mul`."""
    gate, up = accumulate(gate_up).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


@register(op="mla_cache_write", path="ref/torch", device="any", priority=0, layout="mla")
def mla_cache_write(latent: Tensor, k_rope: Tensor, cache: Tensor, cache_slots: Tensor) -> None:
    """See `ops.mla_cache_write`."""
    keep = cache_slots >= 0
    if cache.dtype is torch.float8_e4m3fn:
        rows = fp8.encode(latent[keep], k_rope[keep])
        cache.view(torch.uint8).view(-1, cache.shape[-1])[cache_slots[keep]] = rows.view(torch.uint8)
        return
    rows = torch.cat((latent, k_rope), dim=-1)[keep]  # [kept, rank + rope]
    cache.view(-1, cache.shape[-1])[cache_slots[keep]] = rows.to(cache.dtype)


@register(op="gqa_cache_write", path="ref/torch", device="any", priority=0, layout="gqa")
def gqa_cache_write(k: Tensor, v: Tensor, cache: Tensor, cache_slots: Tensor) -> None:
    """See `ops.gqa_cache_write`."""
    keep = cache_slots >= 0
    block_tokens = cache.shape[3]
    block, offset = cache_slots[keep] // block_tokens, cache_slots[keep] % block_tokens
    if cache.dtype is torch.float8_e4m3fn:
        both = torch.stack((fp8.encode_heads(k[keep]), fp8.encode_heads(v[keep])), dim=1)  # [kept, 2, kv_heads, hd + 4]
        cache.view(torch.uint8)[block, :, :, offset] = both.view(torch.uint8)
        return
    cache[block, 0, :, offset] = k[keep].to(cache.dtype)  # [kept, kv_heads, head_dim]
    cache[block, 1, :, offset] = v[keep].to(cache.dtype)


@register(op="gqa_rotary_write", path=PARTS, device="any", priority=0, layout="gqa")
def gqa_rotary_write(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cos_sin: Tensor, cache: Tensor, cache_slots: Tensor
) -> Tensor:
    """See `ops.gqa_rotary_write`: its two parts, each by the best kernel for it."""
    q, k = ops.rotary(q, k, positions, cos_sin, False)
    ops.gqa_cache_write(k, v, cache, cache_slots)
    return q


@register(op="mla_rotary_write", path=PARTS, device="any", priority=0, layout="mla")
def mla_rotary_write(
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    interleaved: bool,
    cache: Tensor,
    cache_slots: Tensor,
) -> Tensor:
    """See `ops.mla_rotary_write`: its two parts, each by the best kernel for it."""
    q_rope, k_rotated = ops.rotary(q_rope, k_rope.unsqueeze(1), positions, cos_sin, interleaved)
    ops.mla_cache_write(latent, k_rotated.squeeze(1), cache, cache_slots)
    return q_rope

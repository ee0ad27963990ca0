"""Rotary position embedding: the table of cosines and sines that all layers share (arXiv:2104.09864).

Frequencies follow transformers' `modeling_rope_utils.py` step by step, in float32, so that tables are equal bit by bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rope:
    """Parameters of the rotation. `kind` is transformers' `rope_type`; the rest is read by that kind only."""

    kind: str  # default, linear, llama3 or yarn
    theta: float
    width: int  # rotated values per head, even
    interleaved: bool  # pairs (x0, x1), (x2, x3), ... rather than halves
    factor: float = 1.0
    context_original: int = 0  # tokens of the context that the model was first trained on
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn: rotations within the original context above which a frequency is kept as it is
    beta_slow: float = 1.0  # and below which it is divided by `factor`
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True


def cos_sin_table(rope: Rope, context_tokens: int, device: torch.device) -> Tensor:
    """float32 [context_tokens, width]: cosines in the first half of a row, sines in the second."""
    frequencies, scale = frequencies_of(rope)
    positions = torch.arange(context_tokens, dtype=torch.float32)
    angles = positions[:, None] * frequencies  # [p, width / 2]
    return torch.cat([angles.cos() * scale, angles.sin() * scale], dim=-1).to(device)


def frequencies_of(rope: Rope) -> tuple[Tensor, float]:
    """Radians per token, float32 [width / 2], and the factor on cosines and sines."""
    powers = rope.theta ** (torch.arange(0, rope.width, 2, dtype=torch.float32) / rope.width)
    if rope.kind == "default":
        return 1.0 / powers, 1.0
    if rope.kind == "linear":
        return 1.0 / powers / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(1.0 / powers, rope), 1.0
    assert rope.kind == "yarn", rope.kind  # the configuration's parser lets no other through
    return _yarn(powers, rope), yarn_attention_factor(rope)


def _llama3(frequencies: Tensor, rope: Rope) -> Tensor:
    """Llama 3.1: long waves are divided by the factor, short ones kept, those between interpolated."""
    wavelengths = 2 * math.pi / frequencies
    long = rope.context_original / rope.low_freq_factor
    short = rope.context_original / rope.high_freq_factor
    scaled = torch.where(wavelengths > long, frequencies / rope.factor, frequencies)
    blend = (rope.context_original / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    smooth = (1 - blend) * scaled / rope.factor + blend * scaled
    between = (wavelengths >= short) & (wavelengths <= long)
    return torch.where(between, smooth, scaled)


def _yarn(powers: Tensor, rope: Rope) -> Tensor:
    """YaRN's frequencies by parts (arXiv:2309.00071, section 3.2)."""

    def dimension(rotations: float) -> float:
        """The dimension whose wave turns `rotations` times within the original context."""
        turns = rope.context_original / (rotations * 2 * math.pi)
        return rope.width * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.width - 1)
    if low == high:
        high += 0.001  # no division by zero
    ramp = torch.clamp((torch.arange(rope.width // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    kept = 1 - ramp
    return 1.0 / (rope.factor * powers) * (1 - kept) + 1.0 / powers * kept


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """0.1 * mscale * ln(factor) + 1 for a factor above 1 (arXiv:2309.00071, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def yarn_attention_factor(rope: Rope) -> float:
    """The factor on cosines and sines: given, or from both mscales (DeepSeek), or from the factor alone."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)
    return yarn_mscale(rope.factor)


def mla_scale(rope: Rope, head_width: int) -> float:
    """DeepSeek's softmax scale: 1 / sqrt(head width), times mscale_all_dim's mscale squared for a scaled rotation."""
    scale: float = head_width**-0.5
    if rope.kind != "default" and rope.mscale_all_dim:
        scale *= yarn_mscale(rope.factor, rope.mscale_all_dim) ** 2
    return scale

"""Weights in float8 with a factor for each block, as DeepSeek-V3's checkpoints have them.

weight = BlockScaledWeight.of(w)        # [n, k] or [e, n, k] of any floating type, rounded
weight.dequantize()
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128  # rows, and columns, that share a factor (arXiv:2412.19437, section 3.3)
E4M3_MAX = 448.0


@dataclass(frozen=True, slots=True, eq=False)
class BlockScaledWeight:
    """data * factors, block by block."""

    data: Tensor  # float8_e4m3fn [..., n, k]
    factors: Tensor  # float32 [..., ceil(n / 128), ceil(k / 128)]

    def __post_init__(self) -> None:
        *leading, rows, columns = self.data.shape
        expected = (*leading, -(-rows // BLOCK), -(-columns // BLOCK))
        if self.data.dtype is not torch.float8_e4m3fn or self.factors.dtype is not torch.float32:
            raise ValueError(
                f"data is {self.data.dtype}, factors {self.factors.dtype}; expected float8_e4m3fn, float32"
            )
        if self.factors.shape != expected:
            raise ValueError(f"factors has shape {tuple(self.factors.shape)}, expected {expected}")

    @property
    def width(self) -> int:
        """Inputs, k."""
        return int(self.data.shape[-1])

    @property
    def nbytes(self) -> int:
        """Of both."""
        return self.data.nbytes + self.factors.nbytes

    @classmethod
    def of(cls, weight: Tensor) -> BlockScaledWeight:
        """Round `weight` [..., n, k]; the largest of a block becomes 448."""
        rows, columns = weight.shape[-2:]
        padded = torch.nn.functional.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
        blocks = padded.view(*weight.shape[:-2], padded.shape[-2] // BLOCK, BLOCK, -1, BLOCK)  # [..., N, 128, K, 128]
        largest = blocks.abs().amax((-3, -1))
        factors = torch.where(largest > 0, largest / E4M3_MAX, 1.0)  # [..., N, K]
        small = blocks / factors[..., :, None, :, None]
        data = small.flatten(-2).flatten(-3, -2)[..., :rows, :columns].to(torch.float8_e4m3fn)
        return cls(data.contiguous(), factors)

    def dequantize(self) -> Tensor:
        """float32 [..., n, k]."""
        rows, columns = self.data.shape[-2:]
        spread = self.factors.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)
        return self.data.float() * spread[..., :rows, :columns]

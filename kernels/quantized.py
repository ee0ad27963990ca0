"""Weights as small integers: 8 bits with a scale for each row, or 4 bits with one for each group of a row's elements.

    weight = quantize(matrix, bits=4, group=64)   # [n, d] of any floating type
    matrix = weight.dequantize()                  # float32, what it stands for

Round to nearest. A group of 4 bits takes, of some scales up to the one that reaches its largest element, the one with
the least squared error; the side of the largest element gets the eighth step (-8), which the other side has not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 128  # rows are filled up to whole chunks, as csrc/integer.hpp has it
GROUPS = (32, 64, 128)
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)
_ROWS = 1 << 24  # elements worked on at once


@dataclass(frozen=True, slots=True)
class WeightForm:
    """How a model's matrices are kept."""

    bits: int
    group: int


FORMS = {
    "int8": WeightForm(8, 0),
    "int4": WeightForm(4, 64),
    "int4-32": WeightForm(4, 32),
    "int4-128": WeightForm(4, 128),
}


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """[..., n, d] as integers around a zero point; leading axes number experts."""

    bits: int  # 8 or 4
    group: int  # elements that share a scale; 0: a row
    width: int  # d
    data: Tensor  # uint8 [..., n, chunks * 128 * bits / 8]; see csrc/integer.hpp
    scales: Tensor  # float32 [..., n, 1 or chunks * 128 / group]

    @property
    def nbytes(self) -> int:
        """Of data and scales."""
        return self.data.numel() + self.scales.numel() * 4

    def dequantize(self) -> Tensor:
        """The float32 matrix [..., n, d] that it stands for."""
        chunks = _split(self.data, CHUNK * self.bits // 8)
        if self.bits == 4:
            chunks = torch.cat((chunks & 15, chunks >> 4), dim=-1)
        values = chunks.flatten(-2).float() - (1 << (self.bits - 1))
        values = _split(values, values.shape[-1] // self.scales.shape[-1]) * self.scales[..., None]
        return values.flatten(-2)[..., : self.width]


def quantize(matrix: Tensor, *, bits: int, group: int = 64) -> QuantizedWeight:
    """[..., n, d] -> integers. `group` is for 4 bits: 32, 64 or 128. ValueError for what is not known."""
    if bits not in (4, 8) or (bits == 4 and group not in GROUPS):
        raise ValueError(f"weights of {bits} bits in groups of {group}: expected 8, or 4 in groups of 32, 64 or 128")
    *leading, width = matrix.shape
    rows = matrix.reshape(-1, width)
    group = group if bits == 4 else 0
    data, scales = _native_fit(rows, bits, group) or reference_fit(rows, bits, group)
    return QuantizedWeight(bits, group, width, data.view(*leading, -1), scales.view(*leading, -1))


def reference_fit(rows: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Rows [n, d] -> `data` and `scales` of a QuantizedWeight, in PyTorch; csrc/leaf_fit.hpp has the same bits."""
    width = rows.shape[1]
    chunks = -(-width // CHUNK)
    data = torch.empty(rows.shape[0], chunks * CHUNK * bits // 8, dtype=torch.uint8, device=rows.device)
    scales = torch.empty(rows.shape[0], chunks * CHUNK // group if group else 1, device=rows.device)
    step = max(1, _ROWS // (chunks * CHUNK))
    for first in range(0, rows.shape[0], step):
        some = torch.nn.functional.pad(rows[first : first + step].float(), (0, chunks * CHUNK - width))
        part = _nibbles(some, group) if bits == 4 else _bytes(some)
        data[first : first + step], scales[first : first + step] = part
    return data, scales


def _native_fit(rows: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor] | None:
    if not (rows.is_cpu and rows.is_contiguous() and rows.dtype in (torch.float32, torch.bfloat16)):
        return None
    try:
        from tokenrelay.kernels.cpu import integer
    except ImportError:  # no native extension
        return None
    return integer.fit(integer.fit_variants()[0], rows.detach(), bits, group)


def _bytes(rows: Tensor) -> tuple[Tensor, Tensor]:
    scales = rows.abs().amax(dim=-1, keepdim=True) / 127
    whole = (rows / torch.where(scales > 0, scales, 1)).round()
    return (whole + 128).to(torch.uint8), scales


def _nibbles(rows: Tensor, group: int) -> tuple[Tensor, Tensor]:
    groups = _split(rows, group)
    most = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True))
    best = torch.full_like(most, float("inf"), dtype=torch.float64)
    scales, whole = torch.zeros_like(most), torch.full_like(groups, 8)
    for shrink in _SHRINK:
        tried = most * (shrink / -8)
        steps = (groups / torch.where(tried != 0, tried, 1)).round().clamp(-8, 7)
        error = (steps * tried - groups).double().square().sum(dim=-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scales = torch.where(better, tried, scales)
        whole = torch.where(better, steps + 8, whole)
    halves = _split(whole.flatten(-2).to(torch.uint8), CHUNK // 2)  # [n, 2 * chunks, 64]
    return (halves[:, 0::2] | (halves[:, 1::2] << 4)).flatten(-2), scales.squeeze(-1)


def _split(tensor: Tensor, size: int) -> Tensor:
    """[..., m * size] -> [..., m, size]."""
    return tensor.reshape(*tensor.shape[:-1], -1, size)

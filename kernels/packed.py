"""Weights as the CPU's widest kernels read them: 16 columns side by side, streamed from memory in order.

    if packs(16):                                    # this machine has the instructions
        weight = pack(matrix)                        # [n, d] bfloat16, or a QuantizedWeight
        y = ops.packed_linear(x, weight)

Packing is done once, when a model is loaded; csrc/packed.hpp says how the elements lie.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenrelay.kernels.quantized import CHUNK, QuantizedWeight

COLUMNS = 16  # of a block


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """[n, d], or for experts [e, n, d] with n a multiple of 16, in blocks of 16 rows of the matrix."""

    bits: int  # 16: bfloat16; 8 or 4: integers around a zero point
    group: int  # elements of 4 bits that share a scale; else 0
    experts: int  # 0: one matrix
    columns: int  # n
    width: int  # d
    data: Tensor  # uint8 [bytes]
    scales: Tensor  # float32 [scales]; empty for bfloat16

    @property
    def nbytes(self) -> int:
        """Of data and scales."""
        return self.data.numel() + self.scales.numel() * 4

    def unpack(self) -> Tensor:
        """The matrix or matrices that it stands for: bfloat16, or float32 where it has integers."""
        columns = max(1, self.experts) * self.columns
        blocks = -(-columns // COLUMNS)
        if self.bits == 16:
            pairs = self.data.view(torch.bfloat16).view(blocks, -1, COLUMNS, 2)
            rows = pairs.transpose(1, 2).reshape(blocks * COLUMNS, -1)
        else:
            four = self.data.view(blocks, -1, COLUMNS, 4)
            if self.bits == 4:
                four = torch.stack((four & 15, four >> 4), dim=2).flatten(1, 2)
            values = four.transpose(1, 2).reshape(blocks, COLUMNS, -1).float() - (1 << (self.bits - 1))
            scales = self.scales.view(blocks, -1, COLUMNS).transpose(1, 2)  # [blocks, 16, groups]
            grouped = values.view(blocks, COLUMNS, scales.shape[-1], -1) * scales[..., None]
            rows = grouped.reshape(blocks * COLUMNS, -1)
        rows = rows[:columns, : self.width]
        return rows.reshape(self.experts, self.columns, self.width) if self.experts else rows


@dataclass(frozen=True, slots=True)
class PackedHeads:
    """Latent attention's w_uk [h, nope, rank] and w_uv [h, v, rank], as its kernels multiply by them."""

    up: PackedWeight  # [h * nope + h * v, rank]: latents into the keys of all heads, then into their values
    absorb: PackedWeight  # [h * rank, nope]: queries into the space of latents


def pack_heads(w_uk: Tensor, w_uv: Tensor) -> PackedHeads | None:
    """None where this machine has no kernels for them, or none for these widths."""
    (heads, nope, rank), value = w_uk.shape, w_uv.shape[1]
    if not packs_well(w_uk) or nope % 2 or rank % COLUMNS or value % COLUMNS or heads * nope % COLUMNS:
        return None
    up = torch.cat([w_uk.flatten(0, 1), w_uv.flatten(0, 1)])
    return PackedHeads(pack(up), pack(w_uk.transpose(1, 2).reshape(heads * rank, nope)))


def packs(bits: int) -> bool:
    """Whether this machine has kernels for packed weights of so many bits."""
    try:
        import tokenrelay.kernels._cpu as native
    except ImportError:
        return False
    return native.packs(bits)


def packs_well(weight: Tensor | QuantizedWeight) -> bool:
    """Whether `pack` takes it and this machine has kernels for the result."""
    if isinstance(weight, Tensor):
        return weight.is_cpu and weight.dtype is torch.bfloat16 and packs(16)
    return weight.data.is_cpu and packs(weight.bits)


def pack(weight: Tensor | QuantizedWeight) -> PackedWeight:
    """From [n, d] or [e, n, d] on the CPU, dense; ValueError for what cannot be packed."""
    import tokenrelay.kernels._cpu as native

    if isinstance(weight, Tensor):
        bits, group, rows, scales = 16, 0, weight, torch.empty(0)
        *leading, columns, width = weight.shape
        if weight.dtype is not torch.bfloat16:
            raise ValueError(f"weight is {weight.dtype}, expected torch.bfloat16 or a QuantizedWeight")
    else:
        bits, group, rows, scales = weight.bits, weight.group, weight.data, weight.scales
        *leading, columns, width = *weight.scales.shape[:-1], weight.width
    if not (rows.is_cpu and rows.is_contiguous() and scales.is_contiguous()):
        raise ValueError(f"weight must be contiguous on the cpu, is {rows.stride()} on {rows.device}")
    if len(leading) > 1 or (leading and columns % COLUMNS):
        raise ValueError(
            f"weight has shape {(*leading, columns, width)}, expected [n, d], or [e, n, d] with n % 16 = 0"
        )
    experts = leading[0] if leading else 0
    total = max(1, experts) * columns
    blocks, padded = -(-total // COLUMNS), -(-width // CHUNK) * CHUNK
    row_bytes = (width + width % 2) * 2 if bits == 16 else padded * bits // 8
    groups = 0 if bits == 16 else padded // group if group else 1
    data = torch.empty(blocks * COLUMNS * row_bytes, dtype=torch.uint8)
    packed_scales = torch.empty(blocks * COLUMNS * groups)
    native.pack(
        (bits, group, total, width, data.data_ptr(), packed_scales.data_ptr()), rows.data_ptr(), scales.data_ptr()
    )
    return PackedWeight(bits, group, experts, columns, width, data, packed_scales)

"""The instruction-set variants of the native extension, and argument checks that all its wrappers share.

The extension reads raw memory: whatever a wrapper does not check here can crash the process. What stands inside tensors
(block numbers, positions, token ids) the extension checks itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CODES = {torch.float32: 0, torch.bfloat16: 1}
FLOATS = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class Variant:
    """One set of compiled inner loops."""

    code: int  # as csrc/cpu.hpp numbers it
    name: str
    isa: frozenset[str]
    priority: int
    pairs: bool = False  # multiplies bfloat16 pairs; all else is equal to the variant before

    @property
    def path(self) -> str:
        """Its name in the registry."""
        return f"cpu/{self.name}"


_AVX2 = frozenset({"avx2", "fma", "f16c"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
VARIANTS = (
    Variant(0, "baseline", frozenset(), 10),
    Variant(1, "avx2", _AVX2, 20),
    Variant(2, "avx512", _AVX512, 30),
    Variant(3, "avx512bf16", _AVX512 | {"avx512_bf16"}, 40, pairs=True),
)

PAIRS = VARIANTS[3].code  # the variant beside which packed bfloat16 runs


def code_of(name: str, tensor: Tensor) -> int:
    """The extension's code of a tensor's type; ValueError for one it has no kernels for."""
    code = CODES.get(tensor.dtype)
    if code is None:
        raise ValueError(f"{name} is {tensor.dtype}, expected float32 or bfloat16")
    return code


def check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """ValueError unless the tensor has this type and shape on the CPU and its last axis is contiguous."""
    if tensor.dtype is not dtype:
        raise ValueError(f"{name} is {tensor.dtype}, expected {dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if not tensor.is_cpu:
        raise ValueError(f"{name} is on {tensor.device}, expected cpu")
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name} has strides {tensor.stride()}, its last axis must be contiguous")


def check_dense(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """As `check`, and the whole tensor is contiguous."""
    if tensor.dtype is not dtype:
        raise ValueError(f"{name} is {tensor.dtype}, expected {dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if not (tensor.is_cpu and tensor.is_contiguous()):
        raise ValueError(f"{name} must be contiguous on the cpu, is {tensor.stride()} on {tensor.device}")


def check_axes(name: str, tensor: Tensor, axes: int) -> None:
    """ValueError unless the tensor has this many axes."""
    if tensor.dim() != axes:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {axes} axes")


def part(tensor: Tensor) -> tuple[int, int, int]:
    """Address, token stride and head stride of a [tokens, heads, width] tensor."""
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1)

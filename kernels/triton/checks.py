"""Argument checks that the wrappers share. What stands inside tensors (blocks, slots, positions) cannot be checked
without waiting for the device: kernels mask what is outside where that costs nothing, and else trust the executor."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = ("float32", "bfloat16")


def check(name: str, tensor: Tensor, like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    """ValueError unless the tensor has this shape, `dtype` (default: `like`'s), `like`'s device and a contiguous last
    axis."""
    expected = dtype or like.dtype
    if tensor.dtype is not expected:
        raise ValueError(f"{name} is {tensor.dtype}, expected {expected}")
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, expected {like.device}")
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name} has strides {tensor.stride()}, its last axis must be contiguous")


def check_dense(
    name: str, tensor: Tensor, like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None
) -> None:
    """As `check`, and the whole tensor is contiguous."""
    check(name, tensor, like, shape, dtype)
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, has strides {tensor.stride()}")


def check_axes(name: str, tensor: Tensor, axes: int) -> None:
    """ValueError unless the tensor has this many axes."""
    if tensor.dim() != axes:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {axes} axes")

"""Linear layers on the CPU: weights are read once, and the bits of a row do not depend on the rows beside it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import tokenrelay.kernels._cpu as _native
from tokenrelay.kernels.cpu.variants import FLOATS, Variant, check, check_axes, check_dense, code_of
from tokenrelay.kernels.registry import register


def register_variant(variant: Variant) -> None:
    """Register every operation of this file for one set of inner loops."""
    dtypes = ("bfloat16",) if variant.pairs else FLOATS
    register(op="linear", path=variant.path, isa=variant.isa, dtypes=dtypes, priority=variant.priority)(
        functools.partial(linear, variant.code)
    )


def linear(isa: int, x: Tensor, weight: Tensor, bias: Tensor | None, *, wide: bool) -> Tensor:
    """See `ops.linear`."""
    check_axes("x", x, 2)
    check_axes("weight", weight, 2)
    rows, (columns, depth) = x.shape[0], weight.shape
    code = code_of("x", x)
    check("x", x, x.dtype, (rows, depth))
    check_dense("weight", weight, x.dtype, (columns, depth))
    if bias is not None:
        check_dense("bias", bias, x.dtype, (columns,))
    out = torch.empty(rows, columns, dtype=torch.float32 if wide else x.dtype)
    _native.linear(
        isa,
        code,
        0 if wide else code,
        rows,
        columns,
        depth,
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
    )
    return out

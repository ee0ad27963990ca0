"""Linear layers on the CPU: weights are read once, and the bits of a row do not depend on the rows beside it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import tokenrelay.kernels._cpu as _native
from tokenrelay.kernels.cpu.variants import FLOATS, VARIANTS, Variant, check, check_axes, check_dense, code_of
from tokenrelay.kernels.quantized import CHUNK, QuantizedWeight
from tokenrelay.kernels.registry import register

# As csrc/integer.cpp numbers its variants; each with the other loops that it takes along.
_VNNI = VARIANTS[2].isa | {"avx512_vnni"}
_INTEGER = (
    ("baseline", 0, VARIANTS[0].code, VARIANTS[0].isa, 10),
    ("avx2", 1, VARIANTS[1].code, VARIANTS[1].isa, 20),
    ("avx512vnni", 2, VARIANTS[2].code, _VNNI, 30),
)


def register_integers() -> None:
    """Register the integer products, whose variants are their own."""
    for name, code, plain, isa, priority in _INTEGER:
        register(op="quantized_linear", path=f"cpu/{name}", isa=isa, dtypes=FLOATS, priority=priority)(
            functools.partial(quantized_linear, code, plain)
        )


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


def quantized_linear(
    isa: int, plain: int, x: Tensor, weight: QuantizedWeight, bias: Tensor | None, *, wide: bool
) -> Tensor:
    """See `ops.quantized_linear`."""
    check_axes("x", x, 2)
    rows, columns = x.shape[0], weight.scales.shape[0]
    code = code_of("x", x)
    check("x", x, x.dtype, (rows, weight.width))
    chunks = -(-weight.width // CHUNK)
    check_dense("weight.data", weight.data, torch.uint8, (columns, chunks * CHUNK * weight.bits // 8))
    scales = chunks * CHUNK // weight.group if weight.group else 1
    check_dense("weight.scales", weight.scales, torch.float32, (columns, scales))
    if bias is not None:
        check_dense("bias", bias, x.dtype, (columns,))
    out = torch.empty(rows, columns, dtype=torch.float32 if wide else x.dtype)
    _native.integer_linear(
        isa,
        plain,
        code,
        0 if wide else code,
        weight.bits,
        weight.group,
        rows,
        columns,
        weight.width,
        x.data_ptr(),
        x.stride(0),
        weight.data.data_ptr(),
        weight.scales.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
    )
    return out

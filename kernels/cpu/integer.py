"""Linear layers and experts with weights of 8 or 4 bits on the CPU, in variants of their own: VNNI counts."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import tokenrelay.kernels._cpu as _native
from tokenrelay.kernels.cpu.variants import FLOATS, VARIANTS, check, check_axes, check_dense, code_of
from tokenrelay.kernels.quantized import CHUNK, QuantizedWeight
from tokenrelay.kernels.registry import register

# As csrc/integer.cpp numbers them; each with the other loops that it takes along, and its priority.
_VARIANTS = (
    ("baseline", 0, VARIANTS[0].code, VARIANTS[0].isa, 10),
    ("avx2", 1, VARIANTS[1].code, VARIANTS[1].isa, 20),
    ("avx512vnni", 2, VARIANTS[2].code, VARIANTS[2].isa | {"avx512_vnni"}, 30),
)


def register_all() -> None:
    """Register every operation of this file."""
    for name, code, plain, isa, priority in _VARIANTS:
        for op, call in (("quantized_linear", quantized_linear), ("quantized_moe", quantized_moe)):
            register(op=op, path=f"cpu/{name}", isa=isa, dtypes=FLOATS, priority=priority)(
                functools.partial(call, code, plain)
            )


def fit_variants() -> list[int]:
    """The variants of `fit` that this machine runs, the widest first."""
    have = frozenset(_native.isa_features())
    return [code for _, code, _, isa, _ in reversed(_VARIANTS) if isa <= have]


def fit(variant: int, rows: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Rows [n, d] of weights, dense, as integers: `data` and `scales` of a QuantizedWeight, all threads at work."""
    n, width = rows.shape
    check_dense("rows", rows, rows.dtype, (n, width))
    padded = -(-width // CHUNK) * CHUNK
    data = torch.empty(n, padded * bits // 8, dtype=torch.uint8)
    scales = torch.empty(n, padded // group if group else 1)
    _native.integer_fit(
        variant, code_of("rows", rows), bits, group, n, width, rows.data_ptr(), data.data_ptr(), scales.data_ptr()
    )
    return data, scales


def quantized_linear(
    isa: int, plain: int, x: Tensor, weight: QuantizedWeight, bias: Tensor | None, *, wide: bool
) -> Tensor:
    """See `ops.quantized_linear`."""
    check_axes("x", x, 2)
    rows, columns = x.shape[0], weight.scales.shape[0]
    code = code_of("x", x)
    check("x", x, x.dtype, (rows, weight.width))
    _check("weight", weight, (columns, weight.width))
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


def quantized_moe(
    isa: int,
    plain: int,
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    w_gate_up: QuantizedWeight,
    w_down: QuantizedWeight,
) -> Tensor:
    """See `ops.quantized_moe`."""
    check_axes("x", x, 2)
    check_axes("experts", experts, 2)
    code = code_of("x", x)
    (tokens, width), top_k = x.shape, experts.shape[1]
    count, hidden = w_down.scales.shape[0], w_down.width
    check("x", x, x.dtype, (tokens, width))
    check_dense("experts", experts, torch.int32, (tokens, top_k))
    check_dense("weights", weights, torch.float32, (tokens, top_k))
    _check("w_gate_up", w_gate_up, (count, 2 * hidden, width))
    _check("w_down", w_down, (count, width, hidden))
    if w_gate_up.bits != w_down.bits:
        raise ValueError(f"w_gate_up has {w_gate_up.bits} bits, w_down {w_down.bits}: expected the same")
    out = torch.empty(tokens, width, dtype=x.dtype)
    _native.integer_moe(
        isa,
        plain,
        code,
        w_down.bits,
        w_gate_up.group,
        w_down.group,
        tokens,
        top_k,
        count,
        width,
        hidden,
        x.data_ptr(),
        x.stride(0),
        experts.data_ptr(),
        weights.data_ptr(),
        (w_gate_up.data.data_ptr(), w_gate_up.scales.data_ptr()),
        (w_down.data.data_ptr(), w_down.scales.data_ptr()),
        out.data_ptr(),
    )
    return out


def _check(name: str, weight: QuantizedWeight, shape: tuple[int, ...]) -> None:
    """ValueError unless it stands for a matrix, or matrices, of this shape."""
    *leading, width = shape
    if weight.width != width:
        raise ValueError(f"{name} has rows of {weight.width} elements, expected {width}")
    padded = -(-width // CHUNK) * CHUNK
    check_dense(f"{name}.data", weight.data, torch.uint8, (*leading, padded * weight.bits // 8))
    scales = padded // weight.group if weight.group else 1
    check_dense(f"{name}.scales", weight.scales, torch.float32, (*leading, scales))

"""Linear layers and experts over packed weights: AVX-512 with BF16 for bfloat16, with VNNI for integers."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import tokenrelay.kernels._cpu as _native
from tokenrelay.kernels.cpu.variants import FLOATS, VARIANTS, check, check_axes, check_dense, code_of
from tokenrelay.kernels.packed import PackedWeight
from tokenrelay.kernels.registry import Limit, register

_Weight = tuple[int, int, int, int, int, int]
_PRIORITY = 40


def register_all() -> None:
    """Register every operation of this file."""
    wide, pairs = VARIANTS[2], VARIANTS[3]
    for op, call in (("packed_linear", packed_linear), ("packed_moe", packed_moe)):
        register(
            op=op,
            path=pairs.path,
            isa=pairs.isa,
            dtypes=("bfloat16",),
            limits={"bits": Limit(16, 16)},
            priority=_PRIORITY,
        )(functools.partial(call, pairs.code))
        register(
            op=op,
            path="cpu/avx512vnni",
            isa=wide.isa | {"avx512_vnni"},
            dtypes=FLOATS,
            limits={"bits": Limit(4, 8, 4)},
            priority=_PRIORITY,
        )(functools.partial(call, wide.code))


def native_weight(weight: PackedWeight) -> _Weight:
    """The weight as the extension takes it."""
    total = max(1, weight.experts) * weight.columns
    return weight.bits, weight.group, total, weight.width, weight.data.data_ptr(), weight.scales.data_ptr()


def packed_linear(isa: int, x: Tensor, weight: PackedWeight, bias: Tensor | None, *, wide: bool) -> Tensor:
    """See `ops.packed_linear`."""
    check_axes("x", x, 2)
    code = code_of("x", x)
    rows = x.shape[0]
    check("x", x, x.dtype, (rows, weight.width))
    if weight.experts:
        raise ValueError(f"weight has {weight.experts} experts, expected one matrix")
    if bias is not None:
        check_dense("bias", bias, x.dtype, (weight.columns,))
    out = torch.empty(rows, weight.columns, dtype=torch.float32 if wide else x.dtype)
    _native.packed_linear(
        isa,
        code,
        0 if wide else code,
        rows,
        x.data_ptr(),
        x.stride(0),
        native_weight(weight),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
    )
    return out


def packed_moe(
    isa: int, x: Tensor, experts: Tensor, weights: Tensor, w_gate_up: PackedWeight, w_down: PackedWeight
) -> Tensor:
    """See `ops.packed_moe`."""
    check_axes("x", x, 2)
    check_axes("experts", experts, 2)
    code = code_of("x", x)
    (tokens, width), top_k = x.shape, experts.shape[1]
    count, hidden = w_down.experts, w_down.width
    check("x", x, x.dtype, (tokens, width))
    check_dense("experts", experts, torch.int32, (tokens, top_k))
    check_dense("weights", weights, torch.float32, (tokens, top_k))
    found = (w_gate_up.experts, w_gate_up.columns, w_gate_up.width, w_down.columns)
    if found != (count, 2 * hidden, width, width) or not count:
        raise ValueError(f"w_gate_up and w_down are of {found}, expected {(count, 2 * hidden, width, width)}")
    out = torch.empty(tokens, width, dtype=x.dtype)
    _native.packed_moe(
        isa,
        code,
        tokens,
        top_k,
        count,
        width,
        hidden,
        x.data_ptr(),
        x.stride(0),
        experts.data_ptr(),
        weights.data_ptr(),
        native_weight(w_gate_up),
        native_weight(w_down),
        out.data_ptr(),
    )
    return out

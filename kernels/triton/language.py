"""What all kernels here share: the decorator, products and conversions that are right in the interpreter too.

Triton's interpreter (3.7) multiplies bfloat16 operands as if they were whole numbers, rounds to bfloat16 and float8
wrongly, and is slow at both. `dot`, `widen` and `narrow` are exact there and plain instructions on a device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2_E = tl.constexpr(1.4426950408889634)


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, with a type that a checker can follow. Arguments are annotated `tl.tensor` or `tl.constexpr`."""
    return triton.jit(function)


@jit
def widen(x: tl.tensor) -> tl.tensor:
    """`x` in float32; exact."""
    if INTERPRET and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@jit
def narrow(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """float32 `x` in `dtype`, rounded to the nearest, ties to even; float8 (E4M3) saturates at 448."""
    if dtype == tl.float8e4nv:
        x = tl.minimum(tl.maximum(x, -448.0), 448.0)
    if INTERPRET:
        if dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        if dtype == tl.float8e4nv:
            bits = x.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000
            small = tl.where(x < 0, (x - 16384.0) + 16384.0, (x + 16384.0) - 16384.0)  # below 2^-6: steps of 2^-9
            x = tl.where(tl.abs(x) < 0.015625, small, bits.to(tl.float32, bitcast=True))
    return x.to(dtype)


@jit
def dot(a: tl.tensor, b: tl.tensor, acc: tl.tensor) -> tl.tensor:
    """acc + a b in float32: float32 operands are multiplied exactly, narrow ones by the matrix units."""
    if INTERPRET:
        return tl.dot(widen(a), widen(b), acc)
    return tl.dot(a, b, acc, input_precision="ieee")


@jit
def last_at_most(sums: tl.tensor, count: tl.tensor, value: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """The index of the last of `count` + 1 ascending int32 `sums` (the first is 0) that is not above `value`."""
    found = tl.zeros((), tl.int32)
    for first in range(0, count + 1, BLOCK):
        at = first + tl.arange(0, BLOCK)
        found += tl.sum((tl.load(sums + at, mask=at <= count, other=2147483647) <= value).to(tl.int32), 0)
    return found - 1

"""Packed weights: every path against float64, rows that do not depend on each other, what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import close, paths, rounded
from moe_oracles import moe_inputs, moe_oracle
from torch import Tensor

from tokenrelay.kernels import cpu, ops, registry
from tokenrelay.kernels.packed import pack, packs
from tokenrelay.kernels.quantized import QuantizedWeight, quantize

SHAPES = [(1, 1, 1), (1, 40, 7), (2, 33, 64), (5, 100, 96), (64, 31, 130), (70, 65, 257), (9, 130, 2048)]
FORMATS = [(16, 0), (8, 0), (4, 32), (4, 64), (4, 128)]
CASES = [
    (path, bits, group)
    for bits, group in FORMATS
    for path in ["ref/torch", *paths("packed_linear", "bfloat16")]
    if path == "ref/torch" or (path.endswith("bf16") == (bits == 16))
]
each_case = pytest.mark.parametrize(("path", "bits", "group"), CASES)


def form_of(matrix: Tensor, bits: int, group: int) -> tuple[Tensor | QuantizedWeight, Tensor]:
    """What is packed, and in float64 what it stands for."""
    if bits == 16:
        return matrix, matrix.double()
    weight = quantize(matrix, bits=bits, group=group or 64)
    return weight, weight.dequantize().double()


def activations(path: str, x: Tensor, bits: int) -> Tensor:
    """As the path reads them, in float64."""
    return x.double() if bits == 16 or path == "ref/torch" else rounded(x).double()


@each_case
@pytest.mark.parametrize(("rows", "columns", "width"), SHAPES)
def test_packed_linear(path: str, bits: int, group: int, rows: int, columns: int, width: int) -> None:
    x = torch.randn(rows, width + 2).bfloat16()[:, 1:-1]  # a part of something wider
    weight, matrix = form_of(torch.randn(columns, width).bfloat16(), bits, group)
    bias = torch.randn(columns).bfloat16()
    packed = pack(weight)
    assert torch.equal(packed.unpack().double(), matrix)
    truth = activations(path, x, bits) @ matrix.T
    with registry.force("packed_linear", path):
        wide = ops.packed_linear(x, packed, wide=True)
        assert wide.dtype == torch.float32
        assert float((wide.double() - truth).abs().max()) <= 2e-6 * max(1.0, width**0.5) * float(truth.abs().max())
        close(ops.packed_linear(x, packed, bias), truth + bias.double())
        assert ops.packed_linear(x[:0], packed).shape == (0, columns)


@each_case
def test_a_packed_row_does_not_depend_on_those_beside_it(path: str, bits: int, group: int) -> None:
    if path == "ref/torch":
        return
    x = torch.randn(130, 320).bfloat16()
    weight = pack(form_of(torch.randn(75, 320).bfloat16(), bits, group)[0])
    threads = cpu.threads()
    with registry.force("packed_linear", path):
        whole = ops.packed_linear(x, weight, wide=True)
        for rows in (*range(1, 10), 17, 64, 65):
            for first in (0, 1, 130 - rows):
                some = ops.packed_linear(x[first : first + rows], weight, wide=True)
                assert torch.equal(some, whole[first : first + rows])
        cpu.set_threads(3 - min(threads, 2))
        try:
            assert torch.equal(ops.packed_linear(x, weight, wide=True), whole)
        finally:
            cpu.set_threads(threads)


@pytest.mark.skipif(not packs(16), reason="needs AVX-512 with BF16")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.integers(0, 70), columns=st.integers(1, 150), width=st.integers(1, 90))
def test_any_shape_is_exact_in_whole_numbers(rows: int, columns: int, width: int) -> None:
    x = torch.randint(-4, 5, (rows, width)).bfloat16()
    weight = torch.randint(-4, 5, (columns, width)).bfloat16()
    assert torch.equal(ops.packed_linear(x, pack(weight), wide=True), x.float() @ weight.float().T)


@pytest.mark.skipif(not packs(16), reason="needs AVX-512 with BF16")
def test_threads_write_their_own_columns_alone() -> None:
    x = torch.randint(-4, 5, (32, 64)).bfloat16()
    weight = torch.randint(-4, 5, (4096, 64)).bfloat16()
    packed, truth, threads = pack(weight), x.float() @ weight.float().T, cpu.threads()
    cpu.set_threads(3)  # take panels in any order
    try:
        assert all(torch.equal(ops.packed_linear(x, packed, wide=True), truth) for _ in range(50))
    finally:
        cpu.set_threads(threads)


@each_case
@pytest.mark.parametrize(("tokens", "top_k", "count"), [(1, 2, 4), (9, 3, 5), (70, 2, 3)])
def test_packed_moe(path: str, bits: int, group: int, tokens: int, top_k: int, count: int) -> None:
    x, experts, weights, gate_up, down = moe_inputs(tokens, top_k, count, 208, 48, torch.bfloat16)
    experts[0, 0] = -1
    (q_gate_up, wide_gate_up), (q_down, wide_down) = form_of(gate_up, bits, group), form_of(down, bits, group)
    if bits == 16 or path == "ref/torch":
        truth = moe_oracle(x, experts, weights, wide_gate_up, wide_down)
    else:
        truth = rounded_moe(x, experts, weights, wide_gate_up, wide_down)
    p_gate_up, p_down = pack(q_gate_up), pack(q_down)
    assert torch.equal(p_down.unpack().double(), wide_down)
    with registry.force("packed_moe", path):
        found = ops.packed_moe(x, experts, weights, p_gate_up, p_down)
        close(found, truth)
        one = ops.packed_moe(x[-1:], experts[-1:], weights[-1:], p_gate_up, p_down)
        assert path == "ref/torch" or torch.equal(one, found[-1:])


def rounded_moe(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """In float64, rounding activations to bytes before each of the two products."""
    truth, inputs = torch.zeros(x.shape, dtype=torch.float64), rounded(x)
    for t in range(x.shape[0]):
        for k, e in enumerate(experts[t].tolist()):
            if e >= 0:
                gate, up = (inputs[t] @ gate_up[e].T).chunk(2)
                truth[t] += weights[t, k] * (rounded((torch.nn.functional.silu(gate) * up)[None])[0] @ down[e].T)
    return truth


def test_packed_extremes() -> None:
    """What is not a number comes out as such, in its row only; zeros stay zeros."""
    for bits, group in FORMATS:
        weight = form_of(torch.randn(33, 200).bfloat16(), bits, group)[0]
        x = torch.ones(3, 200).bfloat16()
        x[1, 150], x[2] = float("nan"), 0
        out = ops.packed_linear(x, pack(weight))
        assert torch.isnan(out[1]).all() and torch.isfinite(out[[0, 2]]).all()
        assert torch.equal(out[2], torch.zeros(33).bfloat16())


def test_wrong_packed_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"weight is torch\.float32, expected torch\.bfloat16"):
        pack(torch.randn(4, 4))
    with pytest.raises(ValueError, match="weight must be contiguous"):
        pack(torch.randn(4, 8).bfloat16().T)
    with pytest.raises(ValueError, match=r"\(2, 5, 8\), expected \[n, d\], or \[e, n, d\] with n % 16 = 0"):
        pack(torch.randn(2, 5, 8).bfloat16())
    weight = pack(torch.randn(5, 8).bfloat16())
    for path in paths("packed_linear", "bfloat16")[:1]:
        with registry.force("packed_linear", path):
            with pytest.raises(ValueError, match=r"x has shape \(3, 9\), expected \(3, 8\)"):
                ops.packed_linear(torch.randn(3, 9).bfloat16(), weight)
            with pytest.raises(ValueError, match=r"bias has shape \(4,\), expected \(5,\)"):
                ops.packed_linear(torch.randn(3, 8).bfloat16(), weight, torch.zeros(4).bfloat16())
    x, experts, weights, gate_up, down = moe_inputs(3, 2, 4, 32, 16, torch.bfloat16)
    experts[1, 0] = 4
    for path in paths("packed_moe", "bfloat16")[:1]:
        with registry.force("packed_moe", path):
            with pytest.raises(ValueError, match="token 1 chose expert 4 of 4"):
                ops.packed_moe(x, experts, weights, pack(gate_up), pack(down))
            with pytest.raises(ValueError, match="w_gate_up and w_down are of"):
                ops.packed_moe(x[:, :16].contiguous(), experts, weights, pack(gate_up), pack(down))

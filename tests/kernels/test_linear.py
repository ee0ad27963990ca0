"""Linear layers: every path against float64, any shape, and rows that do not depend on each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import close, each_path, paths
from torch import Tensor

from tokenrelay.kernels import cpu, ops, registry
from tokenrelay.kernels.quantized import quantize

SHAPES = [(1, 1, 1), (1, 40, 7), (2, 33, 64), (5, 100, 96), (64, 31, 130), (70, 65, 257), (3, 8, 2048)]  # rows, out, in


@each_path("linear")
@pytest.mark.parametrize(("rows", "columns", "width"), SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_linear(path: str, dtype: torch.dtype, rows: int, columns: int, width: int, biased: bool) -> None:
    x, weight = torch.randn(rows, width).to(dtype), torch.randn(columns, width).to(dtype)
    bias = torch.randn(columns).to(dtype) if biased else None
    truth = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    with registry.force("linear", path):
        narrow, wide = ops.linear(x, weight, bias), ops.linear(x, weight, bias, wide=True)
        assert ops.linear(x[:0], weight, bias).shape == (0, columns)
    assert narrow.dtype == dtype and wide.dtype == torch.float32
    close(narrow, truth)
    close(wide, truth, 600 if path == "ref/torch" and dtype == torch.bfloat16 else 1)  # torch rounds it in between


@each_path("linear", reference=False)
def test_a_row_does_not_depend_on_those_beside_it(path: str, dtype: torch.dtype) -> None:
    x, weight = torch.randn(130, 320).to(dtype), torch.randn(75, 320).to(dtype)
    threads = cpu.threads()
    with registry.force("linear", path):
        whole = ops.linear(x, weight, wide=True)
        for rows in (1, 2, 3, 5, 17, 64, 65):
            for first in (0, 1, 130 - rows):
                assert torch.equal(ops.linear(x[first : first + rows], weight, wide=True), whole[first : first + rows])
        cpu.set_threads(1)
        try:
            assert torch.equal(ops.linear(x, weight, wide=True), whole)
        finally:
            cpu.set_threads(threads)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.integers(0, 70),
    columns=st.integers(1, 70),
    width=st.integers(1, 90),
    step=st.integers(1, 3),
    path=st.sampled_from(paths("linear", "bfloat16")),
)
def test_any_shape_and_stride(rows: int, columns: int, width: int, step: int, path: str) -> None:
    """Small whole numbers: their sums are exact, so nothing may be off by a bit; x is a slice of something wider."""
    dtype = torch.bfloat16
    x = torch.randint(-4, 5, (rows, width * step + 3)).to(dtype)[:, 2 : 2 + width]
    weight = torch.randint(-4, 5, (columns, width)).to(dtype)
    with registry.force("linear", path):
        assert torch.equal(ops.linear(x, weight, wide=True), x.float() @ weight.float().T)


def rounded(x: Tensor) -> Tensor:
    """Activations as the integer kernels round them, in float64: signed bytes, scaled by the largest of each 128."""
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % 128)).unflatten(-1, (-1, 128))
    largest = padded.abs().amax(dim=-1, keepdim=True)
    inverse = torch.full_like(largest, 127) / largest  # torch takes 127 / largest for 127 * (1 / largest)
    whole = (padded * torch.where(largest > 0, inverse, 0)).round()  # ties to even, as the kernels do
    return (whole.double() * (largest / 127).double()).flatten(-2)[:, : x.shape[1]]


FORMATS = [(8, 0), (4, 32), (4, 64), (4, 128)]


@each_path("quantized_linear", reference=False)
@pytest.mark.parametrize(("rows", "columns", "width"), SHAPES)
@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_quantized_linear(
    path: str, dtype: torch.dtype, rows: int, columns: int, width: int, bits: int, group: int
) -> None:
    """Against the same integers in float64: all that is left is the order of a few float32 sums."""
    x = torch.randn(rows, width).to(dtype) * torch.logspace(-2, 1, width).to(dtype)
    weight, bias = quantize(torch.randn(columns, width), bits=bits, group=group or 64), torch.randn(columns).to(dtype)
    truth = rounded(x) @ weight.dequantize().double().T + bias.double()
    with registry.force("quantized_linear", path):
        close(ops.quantized_linear(x, weight, bias, wide=True), truth, 4)
        close(ops.quantized_linear(x, weight, bias), truth, 4)
        assert ops.quantized_linear(x[:0], weight, bias).shape == (0, columns)


@pytest.mark.parametrize(("bits", "group", "error"), [(8, 0, 0.012), (4, 32, 0.11), (4, 64, 0.12), (4, 128, 0.14)])
def test_quantized_weights_are_near_what_they_stand_for(bits: int, group: int, error: float) -> None:
    """Of a normal distribution, by the theory of a uniform step: the largest of 512 is 3 sigma, of a group less."""
    matrix, x = torch.randn(3, 40, 512), torch.randn(7, 512)
    weight = quantize(matrix, bits=bits, group=group or 64)
    assert weight.data.shape[:2] == (3, 40) and weight.nbytes < matrix.numel() * (bits / 8 + 4 / (group or 512) + 0.01)
    assert float((weight.dequantize() - matrix).square().mean().sqrt()) < error
    one = quantize(matrix[0], bits=bits, group=group or 64)
    assert torch.equal(one.data, weight.data[0])
    exact = x @ matrix[0].T
    off = ops.quantized_linear(x, one) - exact
    assert float(off.square().mean().sqrt() / exact.square().mean().sqrt()) < error + 0.012


def test_quantized_extremes() -> None:
    """Zeros stay zeros; what is not a number comes out as such, in its row only."""
    for bits, group in FORMATS:
        weight = quantize(torch.cat((torch.zeros(1, 200), torch.full((1, 200), 1e30))), bits=bits, group=group or 64)
        assert torch.equal(weight.dequantize()[0], torch.zeros(200))
        assert torch.allclose(weight.dequantize()[1], torch.full((200,), 1e30))
        x = torch.ones(3, 200)
        x[1, 150], x[2] = float("nan"), 0
        for path in paths("quantized_linear"):
            with registry.force("quantized_linear", path):
                out = ops.quantized_linear(x, weight)
            assert torch.isnan(out[1]).all() and torch.isfinite(out[[0, 2]]).all()
            assert torch.equal(out[2], torch.zeros(2)) and out[0, 0] == 0


@each_path("quantized_linear", reference=False)
@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_a_quantized_row_does_not_depend_on_those_beside_it(
    path: str, dtype: torch.dtype, bits: int, group: int
) -> None:
    x, weight = torch.randn(70, 320).to(dtype), quantize(torch.randn(45, 320), bits=bits, group=group or 64)
    with registry.force("quantized_linear", path):
        whole = ops.quantized_linear(x, weight, wide=True)
        for rows in (1, 2, 3, 5, 64):
            for first in (0, 70 - rows):
                some = ops.quantized_linear(x[first : first + rows], weight, wide=True)
                assert torch.equal(some, whole[first : first + rows])


def test_unknown_formats_are_refused() -> None:
    with pytest.raises(ValueError, match="weights of 3 bits"):
        quantize(torch.randn(2, 8), bits=3)
    with pytest.raises(ValueError, match="groups of 48"):
        quantize(torch.randn(2, 8), bits=4, group=48)
    weight = quantize(torch.randn(2, 8), bits=8)
    refused = pytest.raises(ValueError, match=r"x has shape \(3, 9\), expected \(3, 8\)")
    with registry.force("quantized_linear", paths("quantized_linear")[0]), refused:
        ops.quantized_linear(torch.randn(3, 9), weight)


def test_wrong_arguments_are_named() -> None:
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    path = paths("linear")[0]
    with registry.force("linear", path):
        with pytest.raises(ValueError, match=r"x has shape \(3, 7\)"):
            ops.linear(x[:, :7], weight)
        with pytest.raises(ValueError, match="weight must be contiguous"):
            ops.linear(x, torch.randn(8, 5).T)
        with pytest.raises(ValueError, match=r"weight is torch\.bfloat16, expected torch\.float32"):
            ops.linear(x, weight.bfloat16())
        with pytest.raises(ValueError, match=r"bias has shape \(4,\), expected \(5,\)"):
            ops.linear(x, weight, torch.zeros(4))

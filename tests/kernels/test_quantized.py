"""Integer weights: every path against float64, rows that do not depend on each other, extremes, what is refused."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import close, each_path, paths, rounded
from torch import Tensor

from tokenrelay.kernels import ops, registry
from tokenrelay.kernels.quantized import quantize, reference_fit

SHAPES = [(1, 1, 1), (1, 40, 7), (2, 33, 64), (5, 100, 96), (64, 31, 130), (70, 65, 257), (3, 8, 2048)]  # rows, out, in


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


@pytest.mark.parametrize(("bits", "group"), FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 96, 128, 200, 512])
def test_every_variant_fits_the_same_integers(bits: int, group: int, dtype: torch.dtype, width: int) -> None:
    """Ties, zeros and outliers among them: the definition is the one in PyTorch."""
    integer = pytest.importorskip("tokenrelay.kernels.cpu.integer")
    rows = torch.randn(70, width) * torch.logspace(-30, 20, 70)[:, None]
    rows[3], rows[4], rows[5, ::2] = 0, 1, 0
    rows[6] = torch.where(torch.rand(width) < 0.5, 2.5, -2.5)
    rows[7, -1] = 1e4
    rows = rows.to(dtype)
    data, scales = reference_fit(rows, bits, group)
    for variant in integer.fit_variants():
        own, own_scales = integer.fit(variant, rows, bits, group)
        assert torch.equal(own_scales, scales), variant
        assert torch.equal(own, data), variant


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


def moe_case(tokens: int, top_k: int, count: int, width: int, hidden: int) -> tuple[Tensor, ...]:
    experts = torch.stack([torch.randperm(count)[:top_k] for _ in range(tokens)]).int()
    gate_up, down = torch.randn(count, 2 * hidden, width) / width**0.5, torch.randn(count, width, hidden) / hidden**0.5
    return torch.randn(tokens, width), experts, torch.rand(tokens, top_k), gate_up, down


@each_path("quantized_moe", reference=False)
@pytest.mark.parametrize(("bits", "group"), FORMATS)
@pytest.mark.parametrize(("tokens", "top_k", "count"), [(1, 2, 4), (9, 3, 5), (150, 2, 3)])
def test_quantized_moe(
    path: str, dtype: torch.dtype, bits: int, group: int, tokens: int, top_k: int, count: int
) -> None:
    """In float64, rounding activations as the kernels do before each of the two products."""
    x, experts, weights, gate_up, down = moe_case(tokens, top_k, count, 200, 72)
    x = x.to(dtype)
    experts[0, 0] = -1
    q_gate_up, q_down = quantize(gate_up, bits=bits, group=group or 64), quantize(down, bits=bits, group=group or 64)
    truth, inputs = torch.zeros(tokens, 200, dtype=torch.float64), rounded(x)
    for t in range(tokens):
        for k in range(top_k):
            if (e := int(experts[t, k])) >= 0:
                gate, up = (inputs[t] @ q_gate_up.dequantize()[e].double().T).chunk(2)
                hidden = torch.nn.functional.silu(gate) * up
                truth[t] += weights[t, k] * (rounded(hidden[None])[0] @ q_down.dequantize()[e].double().T)
    with registry.force("quantized_moe", path):
        found = ops.quantized_moe(x, experts, weights, q_gate_up, q_down)
        # A hidden value next to the border between two bytes may be rounded to either.
        close(found, truth, 1 if dtype == torch.bfloat16 else 500)
        one = ops.quantized_moe(x[-1:], experts[-1:], weights[-1:], q_gate_up, q_down)
        assert torch.equal(one, found[-1:])


def test_quantized_moe_is_near_the_plain_one() -> None:
    x, experts, weights, gate_up, down = moe_case(40, 2, 4, 256, 128)
    exact = ops.moe(x, experts, weights, gate_up, down)
    for bits, error in ((8, 0.02), (4, 0.2)):
        found = ops.quantized_moe(x, experts, weights, quantize(gate_up, bits=bits), quantize(down, bits=bits))
        assert float((found - exact).square().mean().sqrt() / exact.square().mean().sqrt()) < error


def test_bad_quantized_moe_input() -> None:
    x, experts, weights, gate_up, down = moe_case(3, 2, 4, 32, 16)
    q_gate_up, q_down = quantize(gate_up, bits=8), quantize(down, bits=8)
    with registry.force("quantized_moe", paths("quantized_moe")[0]):
        with pytest.raises(ValueError, match="bits"):
            ops.quantized_moe(x, experts, weights, q_gate_up, quantize(down, bits=4))
        with pytest.raises(ValueError, match="w_gate_up has rows of 32 elements, expected 31"):
            ops.quantized_moe(x[:, :31], experts, weights, q_gate_up, q_down)
        experts[1, 0] = 4
        with pytest.raises(ValueError, match="token 1 chose expert 4 of 4"):
            ops.quantized_moe(x, experts, weights, q_gate_up, q_down)

"""Linear layers with float8 weights and activations against float64: exact on what float8 holds, near the truth."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import close
from torch import Tensor
from triton_cases import DEVICE, pick

from tokenrelay.kernels import ops, registry
from tokenrelay.kernels.scaled import BlockScaledWeight
from tokenrelay.kernels.triton import scaled

MODES = pytest.mark.parametrize("fixed", [False, True], ids=["tiles", "fixed"])


def inputs(rows: int, depth: int, columns: int) -> tuple[Tensor, BlockScaledWeight, Tensor]:
    x = torch.randn(rows, depth).bfloat16()
    w = torch.randn(columns, depth) / depth**0.5
    w[:128] *= 20  # blocks differ
    return x, BlockScaledWeight.of(w), torch.randn(columns).bfloat16()


def there(weight: BlockScaledWeight) -> BlockScaledWeight:
    return BlockScaledWeight(weight.data.to(DEVICE), weight.factors.to(DEVICE))


@MODES
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(
    ("rows", "depth", "columns"), [(1, 128, 32), (17, 300, 200), (0, 128, 16), pick((3, 256, 130), (500, 7168, 2112))]
)
def test_scaled_linear(fixed: bool, wide: bool, rows: int, depth: int, columns: int) -> None:
    x, weight, bias = inputs(rows, depth, columns)
    small, factors = (part.cpu() for part in scaled.quantize(x.to(DEVICE))) if rows else (x, x.float())
    rounded = small.double() * factors.double().repeat_interleave(128, 1)[:, :depth] if rows else x.double()
    for b in (None, bias):
        actual = scaled.scaled_linear(
            fixed, x.to(DEVICE), there(weight), None if b is None else b.to(DEVICE), wide=wide
        )
        assert actual.dtype is (torch.float32 if wide else torch.bfloat16)
        added = 0 if b is None else b.double()
        close(actual.bfloat16().cpu(), rounded @ weight.dequantize().double().T + added)
        truth = x.double() @ weight.dequantize().double().T + added
        assert float((actual.cpu().double() - truth).norm()) <= 0.05 * float(truth.norm())
        with registry.force("scaled_linear", "ref/torch"):
            close(ops.scaled_linear(x, weight, b), truth)


def test_fixed_tiles_make_rows_independent() -> None:
    x, weight, _ = inputs(pick(20, 200), 300, 70)
    x, weight = x.to(DEVICE), there(weight)
    whole = scaled.scaled_linear(True, x, weight, None, wide=True)
    for row in (0, x.shape[0] - 1):
        assert torch.equal(scaled.scaled_linear(True, x[row : row + 1], weight, None, wide=True)[0], whole[row])


def test_a_strided_input() -> None:
    x, weight, _ = inputs(4, 300, 40)
    part = torch.cat((x, x), dim=1).to(DEVICE)[:, :300]
    whole = scaled.scaled_linear(False, x.to(DEVICE), there(weight), None, wide=True)
    assert torch.equal(scaled.scaled_linear(False, part, there(weight), None, wide=True), whole)


def test_bad_tensors_are_refused() -> None:
    x, weight, bias = inputs(2, 256, 40)
    x, weight = x.to(DEVICE), there(weight)
    with pytest.raises(ValueError, match="x has shape"):
        scaled.scaled_linear(False, x[:, :255], weight, None, wide=False)
    with pytest.raises(ValueError, match=r"x is torch\.float32"):
        scaled.scaled_linear(False, x.float(), weight, None, wide=False)
    with pytest.raises(ValueError, match="bias has shape"):
        scaled.scaled_linear(False, x, weight, bias[1:].to(DEVICE), wide=False)

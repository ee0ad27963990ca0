"""Linear layers: every path against float64, any shape, and rows that do not depend on each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import close, each_path, paths

from tokenrelay.kernels import cpu, ops, registry

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

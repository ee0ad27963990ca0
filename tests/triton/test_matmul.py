"""Products with invariant rows against float64, and the invariance."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import close
from triton_cases import DEVICE, pick

from tokenrelay.kernels.triton import matmul

TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@TYPES
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(
    ("rows", "depth", "columns"), [(1, 40, 7), (17, 100, 70), (0, 16, 16), pick((3, 64, 64), (500, 4096, 7168))]
)
def test_linear(dtype: torch.dtype, wide: bool, rows: int, depth: int, columns: int) -> None:
    x, w = torch.randn(rows, depth).to(dtype), (torch.randn(columns, depth) / depth**0.5).to(dtype)
    bias = torch.randn(columns).to(dtype)
    for b in (None, bias):
        actual = matmul.linear(x.to(DEVICE), w.to(DEVICE), None if b is None else b.to(DEVICE), wide=wide)
        assert actual.dtype is (torch.float32 if wide else dtype)
        expected = x.double() @ w.double().T + (0 if b is None else b.double())
        close(actual.to(dtype).cpu(), expected)


@TYPES
def test_per_head_products(dtype: torch.dtype) -> None:
    q = torch.randn(5, 3, 40).to(dtype)[..., 8:]
    w_uk, w_uv = torch.randn(3, 32, 48).to(dtype), torch.randn(3, 20, 48).to(dtype)
    latent = matmul.mla_absorb(q.to(DEVICE), w_uk.to(DEVICE))
    close(latent.cpu(), torch.einsum("thn,hnr->thr", q.double(), w_uk.double()))
    values = matmul.mla_expand(latent, w_uv.to(DEVICE))
    close(values.cpu(), torch.einsum("thr,hvr->thv", latent.cpu().double(), w_uv.double()))


@TYPES
def test_rows_do_not_depend_on_others(dtype: torch.dtype) -> None:
    x, w = torch.randn(40, 100).to(dtype).to(DEVICE), torch.randn(70, 100).to(dtype).to(DEVICE)
    whole = matmul.linear(x, w, None, wide=True)
    for row in (0, 17, 39):
        assert torch.equal(matmul.linear(x[row : row + 1], w, None, wide=True)[0], whole[row])


def test_bad_tensors_are_refused() -> None:
    x, w = torch.zeros(2, 8, device=DEVICE), torch.zeros(4, 8, device=DEVICE)
    with pytest.raises(ValueError, match="x has shape"):
        matmul.linear(x[:, :7], w, None, wide=False)
    with pytest.raises(ValueError, match="bias has shape"):
        matmul.linear(x, w, x[0], wide=False)
    with pytest.raises(ValueError, match="q_nope has shape"):
        matmul.mla_absorb(torch.zeros(2, 3, 5, device=DEVICE), torch.zeros(3, 4, 8, device=DEVICE))

"""Norms, rotation, gated activation and cache writes in Triton against float64."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import close
from torch import Tensor
from triton_cases import DEVICE, pick

from tokenrelay.kernels.layout import GqaLayout, MlaFp8Layout, MlaLayout
from tokenrelay.kernels.ref import elementwise as ref
from tokenrelay.kernels.ref import fp8
from tokenrelay.kernels.triton import elementwise

TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def norm_oracle(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@TYPES
@pytest.mark.parametrize(("rows", "width"), [(1, 7), (5, 128), (0, 64), (3, pick(1536, 7168)), (pick(40, 4096), 100)])
def test_norms(dtype: torch.dtype, rows: int, width: int) -> None:
    x, residual, weight = torch.randn(rows, width), torch.randn(rows, width), torch.randn(width)
    x, residual, weight = (v.to(dtype).to(DEVICE) for v in (x * 3, residual, weight))
    close(elementwise.rms_norm(x, weight, 1e-5).cpu(), norm_oracle(x, weight, 1e-5).cpu())
    normed, total = elementwise.add_rms_norm(x, residual, weight, 1e-5)
    expected = (x.float() + residual.float()).to(dtype)
    assert torch.equal(total, expected)
    close(normed.cpu(), norm_oracle(expected, weight, 1e-5).cpu())


def test_norm_of_strided_rows_and_more_axes() -> None:
    x, weight = torch.randn(6, 80, device=DEVICE)[:, 8:72], torch.randn(64, device=DEVICE)
    close(elementwise.rms_norm(x, weight, 1e-6).cpu(), norm_oracle(x, weight, 1e-6).cpu())
    cube = torch.randn(3, 4, 64, device=DEVICE)
    close(elementwise.rms_norm(cube, weight, 1e-6).cpu(), norm_oracle(cube, weight, 1e-6).cpu())


@TYPES
@pytest.mark.parametrize(("rows", "width"), [(1, 2), (5, 130), (0, 64), (pick(9, 2048), pick(600, 4096))])
def test_silu_mul(dtype: torch.dtype, rows: int, width: int) -> None:
    x = (torch.randn(rows, 2 * width + 4) * 3).to(dtype).to(DEVICE)[:, 4:]
    gate, up = x.double().chunk(2, dim=-1)
    close(elementwise.silu_mul(x).cpu(), (gate / (1 + (-gate).exp()) * up).cpu())


@TYPES
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(5, 1, 64), (4, 2, 18), (pick(3, 128), 1, 128)])
def test_rotary(dtype: torch.dtype, interleaved: bool, heads: int, kv_heads: int, width: int) -> None:
    tokens = pick(6, 500)
    q = torch.randn(heads, tokens, width + 8).to(dtype).transpose(0, 1)[..., 8:]  # any strides but the last
    k = torch.randn(tokens, kv_heads, width).to(dtype)
    positions, angles = torch.randint(50, (tokens,)), torch.randn(50, width // 2)
    table = torch.cat([angles.cos(), angles.sin()], -1)
    actual = elementwise.rotary(q.to(DEVICE), k.to(DEVICE), positions.to(DEVICE), table.to(DEVICE), interleaved)
    expected = ref.rotary(q.double(), k.double(), positions, table.double(), interleaved)
    for found, truth in zip(actual, expected, strict=True):
        close(found.cpu(), truth)


def test_a_position_outside_the_table_is_not_a_number() -> None:
    q, table = torch.randn(3, 2, 16, device=DEVICE), torch.ones(4, 16, device=DEVICE)
    turned, _ = elementwise.rotary(q, q, torch.tensor([0, 4, -1], device=DEVICE), table, False)
    assert turned.isnan().all(-1).all(-1).tolist() == [False, True, True]


@TYPES
def test_cache_writes(dtype: torch.dtype) -> None:
    """What is written stands there, everything else is as it was; a slot that is none is written nowhere."""
    slots = torch.tensor([37, -1, 0, 63, 17], device=DEVICE)
    latent, rope = torch.randn(5, 40).to(dtype).to(DEVICE), torch.randn(5, 20).to(dtype).to(DEVICE)[:, 2:]
    cache = torch.randn(MlaLayout(40, 18, 16).shape(4)).to(dtype).to(DEVICE)
    expected = cache.clone()
    ref.mla_cache_write(latent, rope, expected, slots)
    elementwise.mla_cache_write(latent, rope, cache, slots)
    assert torch.equal(cache, expected)
    k, v = torch.randn(5, 3, 24).to(dtype).to(DEVICE), torch.randn(3, 5, 24).to(dtype).to(DEVICE).transpose(0, 1)
    gqa = torch.randn(GqaLayout(3, 24, 16).shape(4)).to(dtype).to(DEVICE)
    expected = gqa.clone()
    ref.gqa_cache_write(k, v, expected, slots)
    elementwise.gqa_cache_write(k, v, gqa, slots)
    assert torch.equal(gqa, expected)


def test_float8_cache_write_equals_the_reference() -> None:
    layout = MlaFp8Layout(256, 16, 16)
    slots = torch.tensor([37, -1, 0, 63, 17])
    latent, rope = (torch.randn(5, 256) * 30).bfloat16(), torch.randn(5, 16).bfloat16()
    latent[3, :128] = 0
    cache = torch.zeros(layout.shape(4), dtype=torch.uint8).view(torch.float8_e4m3fn)
    expected = cache.clone()
    ref.mla_cache_write(latent, rope, expected, slots)
    here = cache.to(DEVICE)
    elementwise.mla_cache_write(latent.to(DEVICE), rope.to(DEVICE), here, slots.to(DEVICE))
    found, truth = (fp8.decode(x.view(-1, layout.width), 256) for x in (here.cpu(), expected))
    # A device divides by a factor with its own last bit: a value on the edge between two steps may take either.
    assert float((found - truth).abs().max()) <= float(truth.abs().max()) * 2**-4
    assert float((found != truth).float().mean()) < 1e-3
    close(found[slots[slots >= 0]][:, :256], latent[slots >= 0].double(), 2000)  # three bits of mantissa


def test_a_rank_that_float8_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="rank is 200"):
        MlaFp8Layout(200, 16, 16)
    with pytest.raises(ValueError, match="expected an even number"):
        MlaFp8Layout(64, 15, 16)
    cache = torch.zeros(2, 16, 64 + 4 + 30, device=DEVICE).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="cache has shape"):
        latent, rope = torch.zeros(1, 64, device=DEVICE), torch.zeros(1, 16, device=DEVICE)
        elementwise.mla_cache_write(latent.bfloat16(), rope.bfloat16(), cache, torch.zeros(1, device=DEVICE).long())


def test_bad_tensors_are_refused() -> None:
    x = torch.zeros(2, 8, device=DEVICE)
    with pytest.raises(ValueError, match="weight has shape"):
        elementwise.rms_norm(x, x[0, :4], 1e-6)
    with pytest.raises(ValueError, match="width 7"):
        elementwise.silu_mul(x[:, :7])
    with pytest.raises(ValueError, match=r"positions is torch\.int32"):
        q = torch.zeros(2, 1, 8, device=DEVICE)
        elementwise.rotary(q, q, torch.zeros(2, dtype=torch.int32, device=DEVICE), x, False)
    with pytest.raises(ValueError, match="residual has shape"):
        elementwise.add_rms_norm(x, x[:1], x[0], 1e-6)

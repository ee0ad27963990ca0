"""Norms, rotary embedding, gated activation, cache writes: every path against float64."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import close, each_path, make_batch
from torch import Tensor

from tokenrelay.kernels import ops, registry
from tokenrelay.kernels.layout import GqaLayout, MlaLayout

WIDTHS = [1, 7, 64, 130, 2048, 7168]


def norm_oracle(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    rows = [row / math.sqrt(float((row * row).sum()) / len(row) + eps) for row in x.double()]
    return torch.stack(rows) * weight.double() if rows else x.double()


@each_path("rms_norm")
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(path: str, dtype: torch.dtype, width: int) -> None:
    x, weight = torch.randn(5, width).to(dtype), torch.randn(width).to(dtype)
    with registry.force("rms_norm", path):
        close(ops.rms_norm(x, weight, 1e-5), norm_oracle(x, weight, 1e-5))
        assert ops.rms_norm(x[:0], weight, 1e-5).shape == (0, width)


@each_path("rms_norm")
def test_rms_norm_of_a_slice_and_of_heads(path: str, dtype: torch.dtype) -> None:
    x, weight = torch.randn(6, 96).to(dtype), torch.randn(32).to(dtype)
    with registry.force("rms_norm", path):
        close(ops.rms_norm(x[:, 32:64], weight, 1e-6), norm_oracle(x[:, 32:64], weight, 1e-6))
        heads = x.view(6, 3, 32)
        close(ops.rms_norm(heads, weight, 1e-6), norm_oracle(heads.reshape(18, 32), weight, 1e-6).view(6, 3, 32))


@each_path("add_rms_norm")
@pytest.mark.parametrize("width", WIDTHS)
def test_add_rms_norm(path: str, dtype: torch.dtype, width: int) -> None:
    x, residual, weight = torch.randn(3, width).to(dtype), torch.randn(3, width).to(dtype), torch.randn(width).to(dtype)
    before = x.clone(), residual.clone()
    with registry.force("add_rms_norm", path):
        normed, total = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])
    assert torch.equal(total, x + residual)  # rounded once, as the two operations that this one replaces
    close(normed, norm_oracle(total, weight, 1e-5))


@each_path("rotary")
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [2, 16, 34, 64, 128])
def test_rotary(path: str, dtype: torch.dtype, interleaved: bool, width: int) -> None:
    """Pairs as complex numbers, multiplied by e^(i * angle)."""
    angle = torch.rand(50, width // 2, dtype=torch.float64) * 100
    cos_sin = torch.cat((angle.cos(), angle.sin()), dim=-1).float()
    positions = torch.tensor([0, 49, 7, 7])
    wide = torch.randn(4, 3, width + 8).to(dtype)
    q, k = wide[..., 8:], torch.randn(4, 1, width).to(dtype)
    with registry.force("rotary", path):
        turned = ops.rotary(q, k, positions, cos_sin, interleaved)
    for x, actual in zip((q, k), turned, strict=True):
        wide_x = x.double()
        first, second = (wide_x[..., 0::2], wide_x[..., 1::2]) if interleaved else wide_x.chunk(2, dim=-1)
        rotation = torch.complex(*cos_sin[positions].double().chunk(2, dim=-1)).unsqueeze(1)
        spun = torch.complex(first.contiguous(), second.contiguous()) * rotation
        parts = (spun.real, spun.imag)
        close(actual, torch.stack(parts, dim=-1).flatten(-2) if interleaved else torch.cat(parts, dim=-1))


@each_path("rotary", reference=False)
@pytest.mark.parametrize("position", [-1, 10])
def test_rotary_outside_the_table(path: str, dtype: torch.dtype, position: int) -> None:
    x = torch.zeros(1, 1, 8, dtype=dtype)
    with registry.force("rotary", path), pytest.raises(ValueError, match="outside the table"):
        ops.rotary(x, x, torch.tensor([position]), torch.zeros(10, 8), False)


@each_path("silu_mul")
@pytest.mark.parametrize("width", WIDTHS)
def test_silu_mul(path: str, dtype: torch.dtype, width: int) -> None:
    x = (torch.randn(4, 2 * width) * 5).to(dtype)
    x[0, 0] = -200.0  # where a careless exponential overflows
    gate, up = x.double().chunk(2, dim=-1)
    with registry.force("silu_mul", path):
        close(ops.silu_mul(x), gate / (1 + (-gate).exp()) * up)
        assert ops.silu_mul(x[:0]).shape == (0, width)


@each_path("mla_cache_write")
def test_mla_cache_write(path: str, dtype: torch.dtype) -> None:
    layout = MlaLayout(24, 10, 16)
    batch, total = make_batch([(30, 1), (0, 40)], 16)
    joined = torch.randn(41, 50).to(dtype)
    latent, rope = joined[:, :24], joined[:, 30:40]
    cache = torch.zeros(layout.shape(total), dtype=dtype)
    slots = batch.cache_slots.clone()
    slots[3] = -1  # padding: written nowhere
    with registry.force("mla_cache_write", path):
        ops.mla_cache_write(latent, rope, cache, slots)
        ops.mla_cache_write(latent[:0], rope[:0], cache, slots[:0])
    expected = torch.zeros_like(cache)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[slot // 16, slot % 16] = torch.cat((latent[token], rope[token]))
    assert torch.equal(cache, expected)


@each_path("gqa_cache_write")
def test_gqa_cache_write(path: str, dtype: torch.dtype) -> None:
    layout = GqaLayout(3, 20, 16)
    batch, total = make_batch([(30, 1), (0, 40)], 16)
    both = torch.randn(41, 2, 3, 20).to(dtype)
    cache = torch.zeros(layout.shape(total), dtype=dtype)
    with registry.force("gqa_cache_write", path):
        ops.gqa_cache_write(both[:, 0], both[:, 1], cache, batch.cache_slots)
    expected = torch.zeros_like(cache)
    for token, slot in enumerate(batch.cache_slots.tolist()):
        expected[slot // 16, :, :, slot % 16] = both[token]
    assert torch.equal(cache, expected)


def test_cache_writes_outside_are_refused() -> None:
    cache = torch.zeros(MlaLayout(8, 4, 16).shape(2))
    with pytest.raises(ValueError, match=r"cache_slots\[0\] is 32"):
        ops.mla_cache_write(torch.zeros(1, 8), torch.zeros(1, 4), cache, torch.tensor([32]))
    with pytest.raises(ValueError, match="k_rope has shape"):
        ops.mla_cache_write(torch.zeros(2, 8), torch.zeros(1, 4), cache, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"cache_slots is torch\.int32"):
        ops.mla_cache_write(torch.zeros(1, 8), torch.zeros(1, 4), cache, torch.tensor([1], dtype=torch.int32))
    gqa = torch.zeros(GqaLayout(2, 8, 16).shape(2))
    with pytest.raises(ValueError, match=r"cache_slots\[1\] is 99"):
        ops.gqa_cache_write(torch.zeros(2, 2, 8), torch.zeros(2, 2, 8), gqa, torch.tensor([0, 99]))


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="weight has shape"):
        ops.rms_norm(torch.zeros(2, 8), torch.zeros(7), 1e-5)
    with pytest.raises(ValueError, match=r"weight is torch\.float32"):
        ops.rms_norm(torch.zeros(2, 8, dtype=torch.bfloat16), torch.zeros(8), 1e-5)
    with pytest.raises(ValueError, match="residual has shape"):
        ops.add_rms_norm(torch.zeros(2, 8), torch.zeros(1, 8), torch.zeros(8), 1e-5)
    with pytest.raises(ValueError, match="even"):
        ops.silu_mul(torch.zeros(2, 7))
    with pytest.raises(ValueError, match="positions has shape"):
        ops.rotary(
            torch.zeros(2, 1, 8), torch.zeros(2, 1, 8), torch.zeros(1, dtype=torch.int64), torch.zeros(4, 8), True
        )


@each_path("rms_norm", reference=False)
def test_a_row_does_not_depend_on_its_neighbours(path: str, dtype: torch.dtype) -> None:
    x, weight = torch.randn(300, 1000).to(dtype), torch.randn(1000).to(dtype)
    with registry.force("rms_norm", path):
        whole = ops.rms_norm(x, weight, 1e-5)
        assert all(torch.equal(ops.rms_norm(x[i : i + 1], weight, 1e-5)[0], whole[i]) for i in (0, 17, 299))

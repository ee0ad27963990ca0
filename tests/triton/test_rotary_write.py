"""Rotation and cache write in one launch against float64, and bit by bit against the launches that it replaces."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import close
from torch import Tensor
from triton_cases import DEVICE, FULL, pick

from tokenrelay.base.errors import KernelUnavailable
from tokenrelay.kernels import ops, registry
from tokenrelay.kernels.layout import GqaFp8Layout, GqaLayout, MlaFp8Layout, MlaLayout
from tokenrelay.kernels.ref import elementwise as ref
from tokenrelay.kernels.ref import fp8
from tokenrelay.kernels.triton import elementwise, rotary_write

TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
SLOTS = torch.tensor([37, -1, 0, 63, 17, 64])  # one is negative, one behind the cache's end: written nowhere
TOKENS = len(SLOTS)
WRITTEN = (SLOTS >= 0) & (SLOTS < 64)


def table_of(width: int) -> Tensor:
    angles = torch.randn(50, width // 2)
    return torch.cat([angles.cos(), angles.sin()], -1)


def same(actual: Tensor, expected: Tensor) -> None:
    """Bit by bit in the interpreter; a compiler may contract the same expression in another way elsewhere."""
    if FULL:
        close(actual.cpu(), expected.double().cpu())
    else:
        assert torch.equal(actual, expected)


@TYPES
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 2, 18), (5, 5, 64), (pick(12, 128), 3, pick(32, 128))])
def test_grouped_heads(dtype: torch.dtype, heads: int, kv_heads: int, width: int) -> None:
    qkv = torch.randn(TOKENS, heads + 2 * kv_heads, width).to(dtype).to(DEVICE)  # a projection's output: strided parts
    q, k, v = qkv.split_with_sizes((heads, kv_heads, kv_heads), dim=1)
    positions, table = torch.randint(50, (TOKENS,)), table_of(width)
    layout = GqaLayout(kv_heads, width, 16)
    cache = torch.randn(layout.shape(4)).to(dtype)
    here, apart, slots = cache.to(DEVICE), cache.to(DEVICE, copy=True), SLOTS.to(DEVICE)
    where, turns = positions.to(DEVICE), table.to(DEVICE)
    turned = rotary_write.gqa_rotary_write(q, k, v, where, turns, here, slots)

    wide_q, wide_k = ref.rotary(q.double().cpu(), k.double().cpu(), positions, table.double(), False)
    close(turned.cpu(), wide_q)
    expected = cache.double()
    ref.gqa_cache_write(wide_k[WRITTEN], v.double().cpu()[WRITTEN], expected, SLOTS[WRITTEN])
    close(here.cpu(), expected)
    assert torch.equal(here[:, 1].cpu(), expected[:, 1].to(dtype))  # values are copied, and all else is as it was

    parts = elementwise.rotary(q, k, where, turns, False)
    elementwise.gqa_cache_write(parts[1], v, apart, slots)
    same(turned, parts[0])
    same(here, apart)


@TYPES
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "rank", "rope"), [(3, 40, 18), (pick(5, 128), pick(64, 512), 64)])
def test_latents(dtype: torch.dtype, interleaved: bool, heads: int, rank: int, rope: int) -> None:
    q = torch.randn(TOKENS, heads, rope + 6).to(dtype).to(DEVICE)[..., 6:]
    latent, k = torch.randn(TOKENS, rank + rope).to(dtype).to(DEVICE).split_with_sizes((rank, rope), dim=-1)
    positions, table = torch.randint(50, (TOKENS,)), table_of(rope)
    cache = torch.randn(MlaLayout(rank, rope, 16).shape(4)).to(dtype)
    here, apart, slots = cache.to(DEVICE), cache.to(DEVICE, copy=True), SLOTS.to(DEVICE)
    where, turns = positions.to(DEVICE), table.to(DEVICE)
    turned = rotary_write.mla_rotary_write(q, latent, k, where, turns, interleaved, here, slots)

    one = k.double().cpu().unsqueeze(1)
    wide_q, wide_k = ref.rotary(q.double().cpu(), one, positions, table.double(), interleaved)
    close(turned.cpu(), wide_q)
    expected = cache.double()
    ref.mla_cache_write(latent.double().cpu()[WRITTEN], wide_k.squeeze(1)[WRITTEN], expected, SLOTS[WRITTEN])
    close(here.cpu(), expected)

    parts = elementwise.rotary(q, k.unsqueeze(1), where, turns, interleaved)
    elementwise.mla_cache_write(latent, parts[1].squeeze(1), apart, slots)
    same(turned, parts[0])
    same(here, apart)


@pytest.mark.parametrize("rank", [64, 256])
def test_float8_latents(rank: int) -> None:
    """A float8 entry has the bytes that the separate write gives it; decoded, it is near the truth."""
    layout, rope = MlaFp8Layout(rank, 16, 16), 16
    q, k = torch.randn(TOKENS, 3, rope).bfloat16().to(DEVICE), torch.randn(TOKENS, rope).bfloat16().to(DEVICE)
    latent = (torch.randn(TOKENS, rank) * 30).bfloat16().to(DEVICE)
    latent[3] = 0
    positions, table = torch.randint(50, (TOKENS,)).to(DEVICE), table_of(rope).to(DEVICE)
    here = torch.zeros(layout.shape(4), dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn)
    apart, slots = here.clone(), SLOTS.to(DEVICE)
    turned = rotary_write.mla_rotary_write(q, latent, k, positions, table, True, here, slots)
    parts = elementwise.rotary(q, k.unsqueeze(1), positions, table, True)
    elementwise.mla_cache_write(latent, parts[1].squeeze(1), apart, slots)
    same(turned, parts[0])
    assert torch.equal(here.view(torch.uint8), apart.view(torch.uint8))
    entries = fp8.decode(here.cpu().view(-1, layout.width)[SLOTS[WRITTEN]], rank)
    close(entries[:, :rank], latent.double().cpu()[WRITTEN], 2000)  # three bits of mantissa


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 2, 20), (pick(6, 64), 3, pick(32, 128))])
def test_float8_heads(heads: int, kv_heads: int, width: int) -> None:
    """A vector has the bytes that rounding the separately rotated one gives it; decoded, it is near the truth."""
    qkv = (torch.randn(TOKENS, heads + 2 * kv_heads, width) * 30).bfloat16()
    qkv[3] = 0
    q, k, v = qkv.to(DEVICE).split_with_sizes((heads, kv_heads, kv_heads), dim=1)
    positions, table = torch.randint(50, (TOKENS,)).to(DEVICE), table_of(width).to(DEVICE)
    layout = GqaFp8Layout(kv_heads, width, 16)
    here = torch.zeros(layout.shape(4), dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn)
    turned = rotary_write.gqa_rotary_write(q, k, v, positions, table, here, SLOTS.to(DEVICE))
    parts = elementwise.rotary(q, k, positions, table, False)
    same(turned, parts[0])
    expected = torch.zeros(layout.shape(4), dtype=torch.uint8).view(torch.float8_e4m3fn)
    ref.gqa_cache_write(parts[1].cpu()[WRITTEN], v.cpu()[WRITTEN], expected, SLOTS[WRITTEN])
    found, truth = (fp8.decode_heads(cache.cpu()) for cache in (here, expected))
    # A device divides by a factor with its own last bit: a value on the edge between two steps may take either.
    assert float((found - truth).abs().max()) <= float(truth.abs().max()) * 2**-4
    assert float((found != truth).float().mean()) < (1e-3 if FULL else 1e-9)
    written = found[SLOTS[WRITTEN] // 16, :, :, SLOTS[WRITTEN] % 16]
    close(written[:, 1], v.double().cpu()[WRITTEN], 2000)  # three bits of mantissa
    with pytest.raises(ValueError, match="head_dim is 18"):
        rotary_write.gqa_rotary_write(q[..., :18], k[..., :18], v[..., :18], positions, table, here, SLOTS.to(DEVICE))


def test_a_position_outside_the_table_is_not_a_number_and_no_tokens_are_nothing() -> None:
    cache = torch.zeros(GqaLayout(1, 16, 16).shape(1), device=DEVICE)
    q, table = torch.randn(3, 2, 16, device=DEVICE), torch.ones(4, 16, device=DEVICE)
    at, slots = torch.tensor([0, 4, -1], device=DEVICE), torch.tensor([0, 1, 2], device=DEVICE)
    turned = rotary_write.gqa_rotary_write(q, q[:, :1], q[:, :1], at, table, cache, slots)
    assert turned.isnan().all(-1).all(-1).tolist() == [False, True, True]
    assert cache[0, 0, 0, :3].isnan().all(-1).tolist() == [False, True, True]
    assert not cache[0, 1].isnan().any()
    none = q[:0]
    turned = rotary_write.gqa_rotary_write(none, none[:, :1], none[:, :1], at[:0], table, cache, slots[:0])
    assert turned.shape == (0, 2, 16)


def test_bad_tensors_are_refused() -> None:
    cache = torch.zeros(GqaLayout(1, 16, 16).shape(1), device=DEVICE)
    q, table = torch.zeros(2, 2, 16, device=DEVICE), torch.ones(4, 16, device=DEVICE)
    at = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    one = q[:, :1]
    for arguments, message in (
        ((q, q, one, at, table, cache, at), "cache has shape"),
        ((q, one, one[:1], at, table, cache, at), "v has shape"),
        ((q.bfloat16(), one, one, at, table, cache, at), r"q is torch\.bfloat16"),
        ((q, one, one, at.int(), table, cache, at), r"positions is torch\.int32"),
        ((q, one, one, at, table[:, :8], cache, at), "cos_sin has shape"),
        ((q, one, one, at, table, cache, at[:1]), "cache_slots has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            rotary_write.gqa_rotary_write(*arguments)
    latents = torch.zeros(MlaLayout(32, 16, 16).shape(1), device=DEVICE)
    with pytest.raises(ValueError, match="latent has shape"):
        rotary_write.mla_rotary_write(q, torch.zeros(1, 32, device=DEVICE), one[:, 0], at, table, True, latents, at)


def test_what_the_kernels_cannot_do_is_named() -> None:
    """Odd widths and too many heads: what was asked for stands beside what is supported, and the parts run instead."""
    with registry.force("gqa_rotary_write", "triton/rows"), pytest.raises(KernelUnavailable) as refused:
        registry.select("gqa_rotary_write", device=DEVICE.type, dtype="bfloat16", heads=4, kv_heads=2, head_dim=19)
    assert "head_dim: required 19, supported 2..512, a multiple of 2" in str(refused.value)
    chosen = registry.select("mla_rotary_write", device=DEVICE.type, dtype="bfloat16", heads=300, rank=64, rope=16)
    assert chosen.path == "ref/parts"


def test_the_parts_are_what_one_launch_replaces() -> None:
    """The reference dispatches to the best kernel of each part, and is not counted beside them when they are timed."""
    cache = torch.zeros(GqaLayout(1, 16, 16).shape(1))
    q, at, table = torch.randn(2, 2, 16), torch.arange(2), table_of(16)
    with registry.force("gqa_rotary_write", "ref/parts"), registry.timing() as times:
        turned = ops.gqa_rotary_write(q, q[:, :1], q[:, :1], at, table, cache, at)
    assert {key[0] for key in times} == {"rotary", "gqa_cache_write"}
    close(turned, ref.rotary(q.double(), q.double(), at, table.double(), False)[0])

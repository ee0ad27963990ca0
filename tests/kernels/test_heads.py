"""Latent attention's products by head: every path against float64, and rows that do not depend on each other."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from kernel_cases import close, each_path, paths

from tokenrelay.base.errors import KernelUnavailable
from tokenrelay.kernels import ops, registry
from tokenrelay.kernels.packed import pack_heads, packs

SHAPES = [
    (1, 1, 1, 1),
    (3, 2, 16, 32),
    (70, 3, 100, 65),
    (5, 4, 128, 512),
    (2, 2, 33, 7),
]  # tokens, heads, nope or value, rank


@each_path("mla_absorb")
@pytest.mark.parametrize(("tokens", "heads", "nope", "rank"), SHAPES)
def test_absorb(path: str, dtype: torch.dtype, tokens: int, heads: int, nope: int, rank: int) -> None:
    q, w = torch.randn(tokens, heads, nope + 3).to(dtype)[..., 1:-2], torch.randn(heads, nope, rank).to(dtype)
    with registry.force("mla_absorb", path):
        close(ops.mla_absorb(q, w), torch.einsum("thn,hnr->thr", q.double(), w.double()))
        assert ops.mla_absorb(q[:0], w).shape == (0, heads, rank)


@each_path("mla_expand")
@pytest.mark.parametrize(("tokens", "heads", "value", "rank"), SHAPES)
def test_expand(path: str, dtype: torch.dtype, tokens: int, heads: int, value: int, rank: int) -> None:
    x, w = torch.randn(heads, tokens, rank).to(dtype).transpose(0, 1), torch.randn(heads, value, rank).to(dtype)
    with registry.force("mla_expand", path):
        close(ops.mla_expand(x, w), torch.einsum("thr,hvr->thv", x.double(), w.double()))


@each_path("mla_absorb", reference=False)
def test_a_token_does_not_depend_on_those_beside_it(path: str, dtype: torch.dtype) -> None:
    q, w_uk, w_uv = (torch.randn(*shape).to(dtype) for shape in ((130, 3, 96), (3, 96, 80), (3, 40, 96)))
    with registry.force("mla_absorb", path), registry.force("mla_expand", path):
        absorbed, expanded = ops.mla_absorb(q, w_uk), ops.mla_expand(q, w_uv)
        for tokens in (1, 2, 3, 5, 7, 64, 65):
            for first in (0, 130 - tokens):
                some = q[first : first + tokens]
                assert torch.equal(ops.mla_absorb(some, w_uk), absorbed[first : first + tokens])
                assert torch.equal(ops.mla_expand(some, w_uv), expanded[first : first + tokens])


@pytest.mark.skipif(not packs(16), reason="needs AVX-512 with BF16")
@pytest.mark.parametrize(
    ("heads", "nope", "value", "rank"), [(2, 16, 32, 32), (16, 128, 128, 512), (8, 6, 80, 16), (3, 32, 48, 144)]
)
def test_packed_heads(heads: int, nope: int, value: int, rank: int) -> None:
    w_uk, w_uv = torch.randn(heads, nope, rank).bfloat16(), torch.randn(heads, value, rank).bfloat16()
    packed = pack_heads(w_uk, w_uv)
    assert packed is not None
    q = torch.randn(45, heads, nope + 4).bfloat16()[..., 2:-2]
    x = torch.randn(heads, 45, rank).bfloat16().transpose(0, 1)
    absorbed, expanded = ops.mla_absorb(q, w_uk, packed), ops.mla_expand(x, w_uv, packed)
    close(absorbed, torch.einsum("thn,hnr->thr", q.double(), w_uk.double()))
    close(expanded, torch.einsum("thr,hvr->thv", x.double(), w_uv.double()))
    for tokens in (0, 1, 7, 9, 13, 20, 44):
        assert torch.equal(ops.mla_absorb(q[:tokens], w_uk, packed), absorbed[:tokens])
        assert torch.equal(ops.mla_expand(x[45 - tokens :], w_uv, packed), expanded[45 - tokens :])
    wrong = pytest.raises(ValueError, match="packed heads are bfloat16, of an even depth")
    with wrong:
        ops.mla_absorb(q, w_uk, dataclasses.replace(packed, absorb=packed.up))


def test_widths_that_do_not_pack_stay_plain() -> None:
    assert pack_heads(torch.randn(2, 15, 32).bfloat16(), torch.randn(2, 16, 32).bfloat16()) is None
    assert pack_heads(torch.randn(2, 16, 24).bfloat16(), torch.randn(2, 16, 24).bfloat16()) is None
    assert pack_heads(torch.randn(2, 16, 32), torch.randn(2, 16, 32)) is None


def test_wrong_head_products_are_named() -> None:
    wrong = pytest.raises(ValueError, match=r"w_uk has shape \(2, 4, 8\), expected \(2, 5, 8\)")
    with registry.force("mla_absorb", paths("mla_absorb")[0]), wrong:
        ops.mla_absorb(torch.randn(3, 2, 5), torch.randn(2, 4, 8))


def test_deterministic_mode_takes_what_depends_on_a_row_alone() -> None:
    before = registry.select("mla_prefill", dtype="float32").path
    assert not before.endswith("absorbed")
    registry.deterministic()
    try:
        assert registry.is_deterministic()
        assert registry.select("mla_prefill", dtype="float32").path == f"{before}/absorbed"
        verdict = next(v for v in registry.explain("mla_prefill").verdicts if v.kernel.path == before)
        assert "deterministic: required rows that do not depend on others" in verdict.reason
        for op in ("linear", "moe", "packed_linear", "gqa_decode", "mla_decode", "mla_absorb", "mla_expand"):
            assert registry.select(op, dtype="bfloat16").path.startswith("cpu/")
        with registry.force("linear", "ref/torch"), pytest.raises(KernelUnavailable, match="deterministic"):
            ops.linear(torch.randn(2, 3), torch.randn(4, 3))
    finally:
        registry.deterministic(False)
    assert registry.select("mla_prefill", dtype="float32").path == before

"""One launch of each kernel, in the shapes of the models that matter, for `compile_kernels.py`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from kernel_cases import make_batch

from tokenrelay.kernels.batch import PenaltyBatch, SamplingBatch
from tokenrelay.kernels.layout import GqaFp8Layout, GqaLayout, MlaFp8Layout, MlaLayout
from tokenrelay.kernels.scaled import BlockScaledWeight
from tokenrelay.kernels.triton import (
    arch,
    elementwise,
    gqa,
    matmul,
    mla,
    mla_prefill,
    moe,
    rotary_write,
    sampling,
    scaled,
)

BF16 = torch.bfloat16
Launch = tuple[str, Callable[[], object]]


def launches() -> Iterator[Launch]:
    """Name and launch of each."""
    arch.processors = lambda device: 132  # type: ignore[assignment]
    from tokenrelay.kernels.triton import schedule

    schedule.processors = arch.processors
    yield from _elementwise()
    yield from _mla_decode()
    yield from _prefill()
    yield from _products()
    yield from _sampling()
    yield from _moe()


def _elementwise() -> Iterator[Launch]:
    x = torch.zeros(4, 7168, dtype=BF16)
    yield "norm", functools.partial(elementwise.add_rms_norm, x, x, x[0], 1e-6)
    yield "norm", functools.partial(elementwise.rms_norm, x, x[0], 1e-6)
    yield "silu", functools.partial(elementwise.silu_mul, x)
    q, k = torch.zeros(4, 128, 64, dtype=BF16), torch.zeros(4, 1, 64, dtype=BF16)
    table = torch.zeros(64, 64)
    yield "rotary", functools.partial(elementwise.rotary, q, k, torch.zeros(4, dtype=torch.int64), table, True)
    slots = torch.arange(4)
    latent, rope = torch.zeros(4, 512, dtype=BF16), torch.zeros(4, 64, dtype=BF16)
    cache = torch.zeros(MlaLayout(512, 64, 64).shape(2), dtype=BF16)
    yield "write", functools.partial(elementwise.mla_cache_write, latent, rope, cache, slots)
    small = torch.zeros(MlaFp8Layout(512, 64, 64).shape(2)).to(torch.float8_e4m3fn)
    yield "write", functools.partial(elementwise.mla_cache_write, latent, rope, small, slots)
    kv = torch.zeros(4, 8, 128, dtype=BF16)
    gqa = torch.zeros(GqaLayout(8, 128, 64).shape(2), dtype=BF16)
    yield "write", functools.partial(elementwise.gqa_cache_write, kv, kv, gqa, slots)
    for entries in (cache, small):
        call = functools.partial(rotary_write.mla_rotary_write, q, latent, rope, slots, table, True, entries, slots)
        yield "rotary write", call
    wide, table = torch.zeros(4, 64, 128, dtype=BF16), torch.zeros(64, 128)
    heads = torch.zeros(GqaFp8Layout(8, 128, 64).shape(2)).to(torch.float8_e4m3fn)
    for entries in (gqa, heads):
        call = functools.partial(rotary_write.gqa_rotary_write, wide, kv, kv, slots, table, entries, slots)
        yield "rotary write", call


def _mla_decode() -> Iterator[Launch]:
    batch, blocks = make_batch([(200, 1)] * 3, 64)
    for heads in (16, 32, 64):
        for fp8 in (False, True):
            layout = MlaFp8Layout(512, 64, 64) if fp8 else MlaLayout(512, 64, 64)
            cache = torch.zeros(layout.shape(blocks)).to(torch.float8_e4m3fn if fp8 else BF16)
            q = torch.zeros(3, heads, 576, dtype=BF16)
            for fixed in (False, True):
                call = functools.partial(mla.mla_decode, fixed, q[..., :512], q[..., 512:], cache, batch, 0.1)
                yield f"mla {heads} {fp8} {fixed}", call


def _prefill() -> Iterator[Launch]:
    batch, blocks = make_batch([(40, 1), (300, 200)], 64)
    cache = torch.zeros(MlaLayout(512, 64, 64).shape(blocks), dtype=BF16)
    q, w = torch.zeros(200, 16, 192, dtype=BF16), torch.zeros(16, 128, 512, dtype=BF16)
    for tokens in (0, 1000):
        call = functools.partial(
            mla_prefill.mla_prefill, False, q[..., :128], q[..., 128:], cache, batch, w, w, 0.1, absorbed_tokens=tokens
        )
        yield f"mla prefill {tokens}", call
    kv = torch.zeros(GqaLayout(8, 128, 64).shape(blocks), dtype=BF16)
    small = torch.zeros(GqaFp8Layout(8, 128, 64).shape(blocks)).to(torch.float8_e4m3fn)
    for fixed in (False, True):
        q = torch.zeros(200, 64, 128, dtype=BF16)
        yield f"gqa fp8 decode {fixed}", functools.partial(gqa.gqa_decode, fixed, q[:1], small, batch, 0.1)
        yield f"gqa fp8 prefill {fixed}", functools.partial(gqa.gqa_prefill, fixed, q, small, batch, 0.1)
        yield f"gqa decode {fixed}", functools.partial(gqa.gqa_decode, fixed, q[:1], kv, batch, 0.1)
        yield f"gqa prefill {fixed}", functools.partial(gqa.gqa_prefill, fixed, q, kv, batch, 0.1)


def _products() -> Iterator[Launch]:
    x, w = torch.zeros(4, 7168, dtype=BF16), torch.zeros(512, 7168, dtype=BF16)
    yield "linear", functools.partial(matmul.linear, x, w, None, wide=True)
    for rows in (4, 100):
        small = BlockScaledWeight.of(w)
        call = functools.partial(
            scaled.scaled_linear, False, torch.zeros(rows, 7168, dtype=BF16), small, None, wide=False
        )
        yield "linear scaled", call
    q, w_uk = torch.zeros(4, 16, 128, dtype=BF16), torch.zeros(16, 128, 512, dtype=BF16)
    yield "linear absorb", functools.partial(matmul.mla_absorb, q, w_uk)


def _sampling() -> Iterator[Launch]:
    logits, f32 = torch.zeros(2, 129_280), torch.ones(2)
    i32, i64 = torch.ones(2, dtype=torch.int32), torch.ones(2, dtype=torch.int64)
    yield "sample", functools.partial(sampling.sample, logits, SamplingBatch(f32, f32, i32, f32, i64, i32, i64))
    offsets = torch.tensor([0, 1, 2])
    penalties = PenaltyBatch(i64, f32, f32, f32, offsets, i64, i32, offsets, i64, f32)
    yield "penalties", functools.partial(sampling.apply_penalties, logits, penalties)


def _moe() -> Iterator[Launch]:
    """Few and many rows an expert; 7168 x 2048 as DeepSeek-V3's, of two experts."""
    gate_up, down = torch.zeros(2, 4096, 7168, dtype=BF16), torch.zeros(2, 7168, 2048, dtype=BF16)
    small = BlockScaledWeight.of(gate_up), BlockScaledWeight.of(down)
    options = {"top_k": 8, "groups": 8, "groups_top_k": 4, "normalize": True, "scale": 2.5}
    logits, bias = torch.zeros(4, 256), torch.zeros(256)
    route = functools.partial(moe.moe_route, logits, bias, scoring="sigmoid", group_score="top2", **options)
    yield "route", route
    for tokens in (4, 100, 600):
        x, chosen = torch.zeros(tokens, 7168, dtype=BF16), torch.zeros(tokens, 2, dtype=torch.int32)
        weights = torch.zeros(tokens, 2)
        yield f"moe {tokens}", functools.partial(moe.moe, False, x, chosen, weights, gate_up, down)
        yield f"moe {tokens} scaled", functools.partial(moe.scaled_moe, False, x, chosen, weights, *small)

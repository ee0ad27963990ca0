"""Prefill of both kinds of attention, and GQA decode, in Triton against unpaged float64 oracles."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from attention_oracles import SCALE, gqa_oracle, mla_prefill_oracle, prefill_inputs
from kernel_cases import Case, close, gqa_case, mla_case
from triton_cases import DEVICE, FULL, moved, pick

from tokenrelay.kernels.layout import GqaLayout, MlaLayout
from tokenrelay.kernels.ref import attention, fp8
from tokenrelay.kernels.triton import gqa, mla, mla_prefill, schedule

MODES = pytest.mark.parametrize("fixed", [False, True], ids=["balanced", "fixed"])
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
# Decodes, then short pieces after short and long prefixes, then none at all of a prefix.
MIXED = [(40, 1), (0, 1), *pick([(0, 5), (31, 9), (130, 2)], [(0, 50), (5000, 170), (20_000, 3), (513, 400)])]


@pytest.fixture(autouse=True)
def _short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    if not FULL:
        monkeypatch.setattr(schedule, "SPLIT_TOKENS", 64)


@MODES
@TYPES
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_tokens"),
    [(4, 4, 64, 16), (14, 2, 128, 64), (6, 1, 72, 32), *([(64, 8, 128, 64)] if FULL else [])],
)
def test_gqa(fixed: bool, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, block_tokens: int) -> None:
    case = moved(gqa_case(MIXED, GqaLayout(kv_heads, head_dim, block_tokens), dtype))
    q = torch.randn(case.tokens, heads, head_dim).to(dtype)
    there, decodes = q.to(DEVICE), case.batch.decodes
    decoded = gqa.gqa_decode(fixed, there[:decodes], case.cache, case.batch, SCALE)
    filled = gqa.gqa_prefill(fixed, there[decodes:], case.cache, case.batch, SCALE)
    close(decoded.cpu(), gqa_oracle(case, q[:decodes], range(decodes), 0))
    close(filled.cpu(), gqa_oracle(case, q[decodes:], range(decodes, case.rows), decodes))


@MODES
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 20), (14, 2, pick(64, 128))])
def test_gqa_over_a_float8_cache(fixed: bool, heads: int, kv_heads: int, head_dim: int) -> None:
    """Exact on what the cache holds: only the arithmetic is rounded, as in bfloat16. So are the references."""
    case = gqa_case(MIXED, GqaLayout(kv_heads, head_dim, 16), torch.float32)
    cache = fp8.encode_heads(case.cache * 3)  # slots that nobody wrote stay NaN
    places = fp8.decode_heads(cache).double()
    contexts = []
    for row, context in enumerate(case.contexts):
        at = torch.arange(context.shape[2])
        block = case.batch.block_table[int(case.batch.slots[row])].long()[at // 16]
        contexts.append(places[block, :, :, at % 16].permute(1, 2, 0, 3))
    small = Case(case.batch, cache, contexts)
    q, there = torch.randn(case.tokens, heads, head_dim).bfloat16(), moved(small)
    decodes = small.batch.decodes
    on_device = q.to(DEVICE)
    decoded = gqa.gqa_decode(fixed, on_device[:decodes], there.cache, there.batch, SCALE)
    filled = gqa.gqa_prefill(fixed, on_device[decodes:], there.cache, there.batch, SCALE)
    expected = (
        gqa_oracle(small, q[:decodes], range(decodes), 0),
        gqa_oracle(small, q[decodes:], range(decodes, small.rows), decodes),
    )
    assert decoded.dtype is filled.dtype is torch.bfloat16
    close(decoded.cpu(), expected[0], 1.5)
    close(filled.cpu(), expected[1], 1.5)
    close(attention.gqa_decode(q[:decodes], cache, small.batch, SCALE), expected[0])
    close(attention.gqa_prefill(q[decodes:], cache, small.batch, SCALE), expected[1])


def test_gqa_decode_of_drafts() -> None:
    """Three rows of one sequence at consecutive positions read its cache once."""
    case = gqa_case([(50, 3)], GqaLayout(2, 32, 16), torch.float32)
    b = case.batch
    q = torch.randn(3, 6, 32)
    expected = gqa_oracle(case, q, range(1), 0)
    rows = dataclasses.replace(
        b,
        slots=b.slots.repeat(3),
        starts=torch.arange(50, 53, dtype=torch.int32),
        lengths=torch.ones(3, dtype=torch.int32),
        offsets=torch.arange(4, dtype=torch.int32),
        decodes=3,
        groups=torch.tensor([0, 3], dtype=torch.int32),
        group_max=3,
    )
    case = moved(dataclasses.replace(case, batch=rows))
    close(gqa.gqa_decode(False, q.to(DEVICE), case.cache, case.batch, SCALE).cpu(), expected)


def test_gqa_decode_and_prefill_have_the_same_bits_when_fixed() -> None:
    case = moved(gqa_case([(90, 30)], GqaLayout(2, 64, 16), torch.bfloat16))
    q = torch.randn(30, 6, 64).bfloat16().to(DEVICE)
    whole = gqa.gqa_prefill(True, q, case.cache, case.batch, SCALE)
    for first, length in ((0, 13), (13, 1), (14, 16)):
        part = dataclasses.replace(
            case.batch,
            starts=torch.tensor([90 + first], dtype=torch.int32, device=DEVICE),
            lengths=torch.tensor([length], dtype=torch.int32, device=DEVICE),
            offsets=torch.tensor([0, length], dtype=torch.int32, device=DEVICE),
            positions=case.batch.positions[first : first + length],
        )
        found = gqa.gqa_prefill(True, q[first : first + length], case.cache, part, SCALE)
        assert torch.equal(found, whole[first : first + length])
        if length == 1:
            decode = dataclasses.replace(part, decodes=1)
            assert torch.equal(gqa.gqa_decode(True, q[first : first + 1], case.cache, decode, SCALE)[0], whole[first])


@TYPES
@pytest.mark.parametrize("way", ["absorbed", "projected", "fixed", "by cost"])
def test_mla_prefill(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, way: str) -> None:
    heads, rank, rope, nope, value = pick((3, 64, 16, 32, 24), (16, 512, 64, 128, 128))
    layout = MlaLayout(rank, rope, pick(32, 64))
    case = mla_case(MIXED, layout, dtype)
    inputs = prefill_inputs(case, heads, nope, value, layout, dtype)
    expected = mla_prefill_oracle(case, inputs, rank)
    # Two stretches of a page or some in the interpreter.
    monkeypatch.setattr(mla_prefill, "STRETCH_BYTES", pick(heads * (nope + value) * 4 * 64, 64 << 20))
    q_nope, q_rope, w_uk, w_uv = (x.to(DEVICE) for x in inputs)
    case = moved(case)
    tokens = {"absorbed": 1 << 30, "projected": 0, "by cost": pick(3, None), "fixed": None}[way]
    actual = mla_prefill.mla_prefill(
        way == "fixed", q_nope, q_rope, case.cache, case.batch, w_uk, w_uv, SCALE, absorbed_tokens=tokens
    )
    close(actual.cpu(), expected, 1.5)


def test_the_hosts_extents_save_waiting_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    case = moved(mla_case([(5, 1), (7, 3), (0, 9), (2, 30), (4, 2)], MlaLayout(64, 16, 16), torch.float32))
    sizes = (64, 32, 32)  # are not asked where a limit is given
    by_device = mla_prefill._runs(case.batch, sizes, 16)
    extents = tuple((s, n) for s, n in zip(case.batch.starts.tolist(), case.batch.lengths.tolist(), strict=True))
    told = dataclasses.replace(case.batch, extents=extents)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda _: pytest.fail("waited for the device"))
    by_host = mla_prefill._runs(told, sizes, 16)
    shape = [(run.span, run.rows, run.start, run.length, run.batch is None) for run in by_host]
    assert shape == [(run.span, run.rows, run.start, run.length, run.batch is None) for run in by_device]
    assert [run.rows for run in by_host] == [(1, 3), (3, 4), (4, 5)]
    assert mla_prefill._runs(told, sizes, 16) is by_host


def test_mla_decode_and_prefill_have_the_same_bits_when_fixed() -> None:
    heads, rank, rope = 3, 64, 16
    case = moved(mla_case([(100, 20)], MlaLayout(rank, rope, 16), torch.bfloat16))
    q = torch.randn(20, heads, rank + rope).bfloat16().to(DEVICE)
    whole = mla.attend(True, q[..., :rank], q[..., rank:], case.cache, case.batch, SCALE, queries=20, decode=False)
    for row in (0, 7, 19):
        one = dataclasses.replace(
            case.batch,
            starts=torch.tensor([100 + row], dtype=torch.int32, device=DEVICE),
            lengths=torch.ones(1, dtype=torch.int32, device=DEVICE),
            decodes=1,
        )
        at = q[row : row + 1]
        alone = mla.mla_decode(True, at[..., :rank], at[..., rank:], case.cache, one, SCALE)
        assert torch.equal(alone[0], whole[row])


def test_bad_tensors_are_refused() -> None:
    case = moved(gqa_case([(5, 1), (5, 3)], GqaLayout(2, 32, 16), torch.float32))
    with pytest.raises(ValueError, match="multiple of KV heads"):
        gqa.gqa_decode(False, torch.zeros(1, 3, 32, device=DEVICE), case.cache, case.batch, SCALE)
    with pytest.raises(ValueError, match="q has 2 tokens, the batch has 3"):
        gqa.gqa_prefill(False, torch.zeros(2, 4, 32, device=DEVICE), case.cache, case.batch, SCALE)
    with pytest.raises(ValueError, match="q_nope has 2 tokens"):
        nope, weight = torch.zeros(2, 4, 8, device=DEVICE), torch.zeros(4, 8, 32, device=DEVICE)
        mla_prefill.mla_prefill(False, nope, nope, case.cache, case.batch, weight, weight, SCALE)

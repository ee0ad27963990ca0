"""MLA decode in Triton against an unpaged float64 oracle: shapes, drafts, float8, unequal lengths, fixed splits."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from kernel_cases import Case, close, dense_attention, make_batch, mla_case
from torch import Tensor
from triton_cases import DEVICE, FULL, grouped, moved, pick, there

from tokenrelay.kernels import registry
from tokenrelay.kernels.batch import AttentionBatch
from tokenrelay.kernels.layout import MlaFp8Layout, MlaLayout
from tokenrelay.kernels.ref import fp8
from tokenrelay.kernels.triton import mla, schedule
from tokenrelay.kernels.triton.schedule import Tiling, work_of

SCALE = 0.13
MODES = pytest.mark.parametrize("fixed", [False, True], ids=["balanced", "fixed"])
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@pytest.fixture(autouse=True)
def _short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pieces for a context that the interpreter can walk."""
    if not FULL:
        monkeypatch.setattr(schedule, "SPLIT_TOKENS", 64)


def oracle(case: Case, q: Tensor, rank: int) -> Tensor:
    """q [n, h, rank + rope] against each row's latents."""
    out = []
    for row in range(case.batch.decodes):
        entries = case.contexts[row].expand(q.shape[1], -1, -1)
        at = q[row : row + 1].double().cpu()
        out.append(dense_attention(at, entries, entries[..., :rank], entries.shape[1] - 1, SCALE))
    return torch.cat(out)


def run(case: Case, q: Tensor, rank: int, *, fixed: bool, batch: AttentionBatch | None = None) -> Tensor:
    q = q.to(DEVICE)
    return mla.mla_decode(fixed, q[..., :rank], q[..., rank:], case.cache, batch or case.batch, SCALE).cpu()


SHAPES = [(1, 64, 16, 16), (3, 512, 64, 64), (20, 72, 24, 32)]


@MODES
@TYPES
@pytest.mark.parametrize(("heads", "rank", "rope", "block_tokens"), [*SHAPES, *([(128, 512, 64, 64)] if FULL else [])])
def test_unequal_lengths(fixed: bool, dtype: torch.dtype, heads: int, rank: int, rope: int, block_tokens: int) -> None:
    lengths = pick((1, 2, block_tokens, block_tokens + 1, 130), (1, 2, 64, 65, 130, 4097, 20_000, 513))
    layout = MlaLayout(rank, rope, block_tokens)
    case = moved(mla_case([(c - 1, 1) for c in lengths], layout, dtype))
    q = torch.randn(len(lengths), heads, layout.width).to(dtype)
    actual = run(case, q, rank, fixed=fixed)
    assert actual.dtype is dtype
    close(actual, oracle(case, q, rank))


@MODES
@TYPES
def test_drafts_are_folded_into_heads(fixed: bool, dtype: torch.dtype) -> None:
    """Rows of one sequence at consecutive positions, 1 to 8 of them, read the cache once."""
    layout, runs = MlaLayout(64, 16, 16), [1, 8, 3, 1]
    rows, start_of = [], [40, 57, 0, pick(100, 5000)]
    for start, count in zip(start_of, runs, strict=True):
        rows += [(start + i, 1) for i in range(count)]
    case = mla_case(rows, layout, dtype)
    table, slots = case.batch.block_table.clone(), case.batch.slots.clone()
    heads, first = 6, 0
    for count in runs:  # all rows of a run have the table of its last one
        slots[first : first + count] = slots[first + count - 1].item()
        first += count
    batch = dataclasses.replace(case.batch, block_table=table, slots=slots)
    flat = case.cache.view(-1, layout.width)
    contexts = []
    for row, (start, _) in enumerate(rows):
        at = torch.arange(start + 1)
        contexts.append(flat[table[int(slots[row])].long()[at // 16] * 16 + at % 16].double())
    case = moved(Case(grouped(batch, runs), case.cache, contexts))
    q = torch.randn(len(rows), heads, layout.width).to(dtype)
    actual = run(case, q, 64, fixed=fixed)
    close(actual, oracle(case, q, 64))
    alone = run(case, q, 64, fixed=fixed, batch=dataclasses.replace(case.batch, groups=None))
    close(alone, oracle(case, q, 64))
    if fixed:
        assert torch.equal(alone, actual)


@MODES
@pytest.mark.parametrize("rank", [64, 256])
def test_float8_cache(fixed: bool, rank: int) -> None:
    """Exact on what the cache holds: only the arithmetic is rounded, as in bfloat16."""
    layout = MlaFp8Layout(rank, 16, 16)
    batch, total = make_batch([(c - 1, 1) for c in (1, 33, 130)], 16)
    cache = torch.full(layout.shape(total), float("nan")).to(torch.float8_e4m3fn)
    contexts = []
    for row in range(3):
        at = torch.arange(int(batch.starts[row]) + 1)
        where = batch.block_table[int(batch.slots[row])].long()[at // 16] * 16 + at % 16
        entries = fp8.encode(torch.randn(len(at), rank) * 3, torch.randn(len(at), 16))
        cache.view(torch.uint8).view(-1, layout.width)[where] = entries.view(torch.uint8)
        contexts.append(fp8.decode(entries, rank).double())
    case = Case(there(batch), cache.to(DEVICE), contexts)
    q = torch.randn(3, 5, rank + 16).bfloat16()
    expected = oracle(case, q, rank)
    close(run(case, q, rank, fixed=fixed), expected, 1.5)
    with registry.force("mla_decode", "ref/torch"):
        found = registry.select("mla_decode", dtype="float8_e4m3fn").call(
            q[..., :rank], q[..., rank:], case.cache.cpu(), batch, SCALE
        )
    close(found, expected)


def one_row(batch: AttentionBatch, row: int) -> AttentionBatch:
    """The batch with this decode row alone."""
    return dataclasses.replace(
        batch,
        slots=batch.slots[row : row + 1],
        starts=batch.starts[row : row + 1],
        lengths=batch.lengths[row : row + 1],
        decodes=1,
    )


@TYPES
def test_fixed_splits_make_rows_independent(dtype: torch.dtype) -> None:
    layout = MlaLayout(64, 16, 32)
    case = moved(mla_case([(c, 1) for c in pick((3, 150, 64, 200), (3, 1500, 40, 9000, 511, 512))], layout, dtype))
    q = torch.randn(case.rows, 7, layout.width).to(dtype)
    whole = run(case, q, 64, fixed=True)
    for row in range(case.rows):
        alone = run(case, q[row : row + 1], 64, fixed=True, batch=one_row(case.batch, row))
        assert torch.equal(alone[0], whole[row])


@MODES
def test_rows_of_padding_read_and_cost_nothing(fixed: bool) -> None:
    """A captured batch's rows beyond the plan start at -1: no step is theirs, and others do not change."""
    layout = MlaLayout(64, 16, 16)
    case = moved(mla_case([(70, 1), (33, 1)], layout, torch.float32))
    b = case.batch
    pad = torch.tensor([-1, -1], dtype=torch.int32, device=DEVICE)
    padded = dataclasses.replace(
        b,
        slots=torch.cat((b.slots, pad * 0)),
        starts=torch.cat((b.starts, pad)),
        lengths=torch.cat((b.lengths, pad * -1)),
        decodes=4,
    )
    q = torch.randn(4, 3, layout.width)
    close(run(case, q, 64, fixed=fixed, batch=padded)[:2], oracle(case, q[:2], 64))
    work = work_of(padded, Tiling(3, 1, 16, 32, fixed), decode=True)
    assert work.steps.tolist() == [3, 2, 0, 0]


@MODES
def test_extreme_scores(fixed: bool) -> None:
    layout = MlaLayout(32, 16, 16)
    case = moved(mla_case([(150, 1)], layout, torch.float32))
    q = torch.randn(1, 4, layout.width) * 1000
    close(run(case, q, 32, fixed=fixed), oracle(case, q, 32))


def test_nothing_to_do() -> None:
    batch, total = make_batch([], 16)
    cache = torch.zeros(MlaLayout(64, 16, 16).shape(total), device=DEVICE)
    none = torch.empty(0, 4, 80, device=DEVICE)
    assert mla.mla_decode(False, none[..., :64], none[..., 64:], cache, there(batch), SCALE).shape == (0, 4, 64)


def test_strided_queries() -> None:
    layout = MlaLayout(64, 16, 16)
    case = moved(mla_case([(30, 1), (99, 1)], layout, torch.float32))
    q = torch.randn(4, 2, layout.width).transpose(0, 1)
    close(run(case, q, 64, fixed=False), oracle(case, q, 64))


def test_balanced_work_is_equal_work() -> None:
    """Every program gets the same number of steps but for the last, and together they have all of them."""
    rows = [(c - 1, 1) for c in (5000, 1, 63, 64, 900, 17, 20_000)]
    batch = there(make_batch(rows, 64)[0])
    work = work_of(batch, Tiling(16, 1, 16, 64, False), decode=True)
    assert work.steps.tolist() == [79, 1, 1, 1, 15, 1, 313]
    assert work.cum.tolist() == [0, 79, 80, 81, 82, 97, 98, 411]
    assert int(work.share) == max(2, -(-411 // work.parts))
    assert work.places >= work.parts + 7


def test_the_schedule_is_made_once_for_all_layers() -> None:
    batch, tiling = there(make_batch([(5, 1)], 16)[0]), Tiling(16, 1, 16, 32, False)
    assert work_of(batch, tiling, decode=True) is work_of(batch, tiling, decode=True)
    assert work_of(there(batch), tiling, decode=True) is not work_of(batch, tiling, decode=True)


def test_bad_tensors_are_refused() -> None:
    layout = MlaLayout(32, 16, 16)
    case = moved(mla_case([(5, 1)], layout, torch.float32))
    good = torch.zeros(1, 2, 32, device=DEVICE), torch.zeros(1, 2, 16, device=DEVICE), case.cache
    for latent, rope, cache, message in (
        (good[0].bfloat16(), good[1], good[2], "q_latent is torch.bfloat16"),
        (good[0], good[1][..., :15], good[2], "cache has shape"),
        (good[0], good[1], good[2].transpose(0, 1), "cache has shape|cache must be contiguous"),
        (torch.zeros(2, 2, 32, device=DEVICE), torch.zeros(2, 2, 16, device=DEVICE), good[2], "2 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            mla.mla_decode(False, latent, rope, cache, case.batch, SCALE)

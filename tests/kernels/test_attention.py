"""Paged attention, every path against an unpaged float64 oracle: shapes, edges, sharing, independence, bad input."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from attention_oracles import SCALE, gqa_oracle, mla_decode_oracle, mla_prefill_oracle, prefill_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import Case, close, each_path, gqa_case, make_batch, mla_case, paths
from torch import Tensor

from tokenrelay.kernels import cpu, ops, registry
from tokenrelay.kernels.batch import AttentionBatch
from tokenrelay.kernels.layout import ABSORBED_TOKENS, GqaLayout, MlaLayout, absorbed_tokens_max
from tokenrelay.kernels.packed import pack_heads, packs

MIXED = [(0, 1), (63, 1), (64, 1), (700, 1), (0, 5), (15, 33), (513, 17), (1030, 2)]  # decodes, then chunks


def run_mla_decode(case: Case, heads: int, layout: MlaLayout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    q = torch.randn(case.batch.decodes, heads, layout.width).to(dtype)
    actual = ops.mla_decode(q[..., : layout.rank], q[..., layout.rank :], case.cache, case.batch, SCALE)
    return actual, mla_decode_oracle(case, q, layout.rank)


@each_path("mla_decode")
@pytest.mark.parametrize(
    ("heads", "rank", "rope", "block_tokens"),
    [(1, 64, 16, 16), (3, 64, 16, 64), (16, 512, 64, 64), (128, 64, 16, 128), (5, 72, 24, 32), (2, 67, 18, 16)],
)
def test_mla_decode(path: str, dtype: torch.dtype, heads: int, rank: int, rope: int, block_tokens: int) -> None:
    layout = MlaLayout(rank, rope, block_tokens)
    case = mla_case([(c - 1, 1) for c in (1, 2, block_tokens, block_tokens + 1, 130, 513)], layout, dtype)
    with registry.force("mla_decode", path):
        actual, expected = run_mla_decode(case, heads, layout, dtype)
    assert actual.dtype is dtype
    close(actual, expected)


def run_mla_prefill(case: Case, inputs: list[Tensor]) -> Tensor:
    q_nope, q_rope, w_uk, w_uv = inputs
    return ops.mla_prefill(q_nope, q_rope, case.cache, case.batch, w_uk, w_uv, SCALE)


@each_path("mla_prefill")
@pytest.mark.parametrize(
    ("heads", "rank", "rope", "nope", "value", "block_tokens"),
    [(4, 64, 16, 32, 32, 64), (2, 40, 18, 24, 20, 16), (3, 512, 64, 128, 128, 32)],
)
def test_mla_prefill(
    path: str, dtype: torch.dtype, heads: int, rank: int, rope: int, nope: int, value: int, block_tokens: int
) -> None:
    layout = MlaLayout(rank, rope, block_tokens)
    case = mla_case(MIXED, layout, dtype)
    inputs = prefill_inputs(case, heads, nope, value, layout, dtype)
    with registry.force("mla_prefill", path):
        actual = run_mla_prefill(case, inputs)
    close(actual, mla_prefill_oracle(case, inputs, rank), 1.5)


@pytest.mark.parametrize(("start", "nope"), [(0, 16), (2500, 16), (0, 32), (2500, 32)])
@each_path("mla_prefill", reference=False)
def test_mla_prefill_long_chunk_is_projected_up(path: str, dtype: torch.dtype, start: int, nope: int) -> None:
    """A row above the threshold (up to 32 tokens for these sizes) takes the other algorithm, over several stretches."""
    layout = MlaLayout(64, 16, 16)
    case = mla_case([(start, 70), (3, 4), (start // 2, 130)], layout, dtype)
    inputs = prefill_inputs(case, 2, nope, 16, layout, dtype)
    with registry.force("mla_prefill", path):
        actual = run_mla_prefill(case, inputs)
    close(actual, mla_prefill_oracle(case, inputs, 64), 1.5)


@pytest.mark.skipif(not packs(16), reason="needs AVX-512 with BF16")
@pytest.mark.parametrize(("heads", "nope", "value", "rank", "rope"), [(2, 32, 16, 64, 16), (4, 20, 48, 80, 18)])
@pytest.mark.parametrize("start", [0, 500, 2500])
def test_mla_prefill_projects_with_packed_matrices(
    heads: int, nope: int, value: int, rank: int, rope: int, start: int
) -> None:
    case = mla_case([(9, 1), (start, 130), (3, 4), (start // 2, 70)], MlaLayout(rank, rope, 16), torch.bfloat16)
    inputs = prefill_inputs(case, heads, nope, value, MlaLayout(rank, rope, 16), torch.bfloat16)
    q_nope, q_rope, w_uk, w_uv = inputs
    packed = pack_heads(w_uk, w_uv)
    assert packed is not None
    found = ops.mla_prefill(q_nope, q_rope, case.cache, case.batch, w_uk, w_uv, SCALE, packed)
    close(found, mla_prefill_oracle(case, inputs, rank), 1.5)
    assert torch.equal(ops.mla_prefill(q_nope, q_rope, case.cache, case.batch, w_uk, w_uv, SCALE, packed), found)
    if start == 0:
        with pytest.raises(ValueError, match=r"packed.up is 16 bits .*expected 16 bits"):
            ops.mla_prefill(
                q_nope,
                q_rope,
                case.cache,
                case.batch,
                w_uk,
                w_uv,
                SCALE,
                dataclasses.replace(packed, up=packed.absorb),
            )
    case.batch.block_table[case.batch.slots[1], 0] = -1
    with pytest.raises(ValueError, match="row 1: block -1 is not in the cache"):
        ops.mla_prefill(q_nope, q_rope, case.cache, case.batch, w_uk, w_uv, SCALE, packed)


@given(
    tokens=st.integers(1, 5000),
    start=st.integers(0, 200_000),
    widths=st.sampled_from([(512, 128, 128), (64, 32, 16), (40, 128, 128), (67, 20, 24)]),
)
def test_both_sides_choose_the_same_algorithm(tokens: int, start: int, widths: tuple[int, int, int]) -> None:
    native = pytest.importorskip("tokenrelay.kernels._cpu")
    most = absorbed_tokens_max(*widths, start)
    for some in (tokens, min(most, 1 << 40), min(most, 1 << 40) + 1):
        assert native.costs_less_absorbed(some, start, *widths, ABSORBED_TOKENS) == (some <= most)


@each_path("gqa_decode")
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_tokens"),
    [(4, 4, 64, 16), (14, 2, 128, 64), (6, 1, 72, 32), (8, 2, 33, 128)],
)
def test_gqa(path: str, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, block_tokens: int) -> None:
    layout = GqaLayout(kv_heads, head_dim, block_tokens)
    case = gqa_case(MIXED, layout, dtype)
    q = torch.randn(case.tokens, heads, head_dim).to(dtype)
    decodes = case.batch.decodes
    with registry.force("gqa_decode", path), registry.force("gqa_prefill", path):
        decoded = ops.gqa_decode(q[:decodes], case.cache, case.batch, SCALE)
        filled = ops.gqa_prefill(q[decodes:], case.cache, case.batch, SCALE)
    close(decoded, gqa_oracle(case, q[:decodes], range(decodes), 0))
    close(filled, gqa_oracle(case, q[decodes:], range(decodes, case.rows), decodes))


@each_path("gqa_prefill", reference=False)
@pytest.mark.parametrize(("start", "heads"), [(0, 2), (509, 2), (1500, 7), (40, 9)])
def test_long_chunks_of_grouped_heads(path: str, dtype: torch.dtype, start: int, heads: int) -> None:
    """Units of many rows: runs that some of them do not see, blocks of rows that are not full, ends inside a tile. How
    many rows share a unit follows from the number of threads, which the bits do not."""
    layout = GqaLayout(1, 64, 32)
    case = gqa_case([(start, 301), (3, 77), (511, 2)], layout, dtype)
    q = torch.randn(case.tokens, heads, 64).to(dtype)
    before = cpu.threads()
    try:
        with registry.force("gqa_prefill", path):
            cpu.set_threads(1)
            alone = ops.gqa_prefill(q, case.cache, case.batch, SCALE)
            cpu.set_threads(3)
            together = ops.gqa_prefill(q, case.cache, case.batch, SCALE)
    finally:
        cpu.set_threads(before)
    close(alone, gqa_oracle(case, q, range(case.rows), 0))
    assert torch.equal(alone, together)


@each_path("gqa_decode", reference=False)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(12, 6, 64), (18, 6, 33), (4, 4, 128), (40, 2, 32)])
def test_decodes_of_many_heads(path: str, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> None:
    """With enough work for the threads, KV heads share a unit, the last ones fewer; the bits are the same."""
    layout = GqaLayout(kv_heads, head_dim, 16)
    case = gqa_case([(c - 1, 1) for c in (1, 64, 511, 513, 640, 1100, 33, 90)], layout, dtype)
    q = torch.randn(8, heads, head_dim).to(dtype)
    before = cpu.threads()
    try:
        with registry.force("gqa_decode", path):
            cpu.set_threads(1)
            together = ops.gqa_decode(q, case.cache, case.batch, SCALE)
            cpu.set_threads(16)
            apart = ops.gqa_decode(q, case.cache, case.batch, SCALE)
    finally:
        cpu.set_threads(before)
    close(together, gqa_oracle(case, q, range(8), 0))
    assert torch.equal(together, apart)


@each_path("gqa_prefill", reference=False)
def test_extreme_scores_of_grouped_heads(path: str, dtype: torch.dtype) -> None:
    """Scores in the thousands, both ways, neither overflow nor give NaN; a NaN stays in its row."""
    layout = GqaLayout(2, 32, 16)
    case = gqa_case([(600, 40)], layout, dtype)
    q = (torch.randn(40, 4, 32) * 1000).to(dtype)
    with registry.force("gqa_prefill", path):
        close(ops.gqa_prefill(q, case.cache, case.batch, SCALE), gqa_oracle(case, q, range(1), 0), 8)
        q[7, 2, 5] = float("nan")
        out = ops.gqa_prefill(q, case.cache, case.batch, SCALE)
    spoiled = torch.zeros(40, 4, dtype=torch.bool)
    spoiled[7, 2] = True
    assert torch.equal(out.isnan().any(-1), spoiled)
    assert torch.equal(out.isnan().all(-1), spoiled)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 200), st.integers(1, 20)), min_size=1, max_size=5),
    decodes=st.lists(st.integers(0, 600), max_size=4),
    heads=st.integers(1, 20),
    rank=st.integers(4, 24).map(lambda n: 4 * n - 1),
    rope=st.sampled_from([16, 22, 64]),
    block_tokens=st.sampled_from([16, 32, 64, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    path=st.sampled_from(paths("mla_decode", "float32")),
)
def test_mla_any_shape(
    rows: list[tuple[int, int]],
    decodes: list[int],
    heads: int,
    rank: int,
    rope: int,
    block_tokens: int,
    dtype: torch.dtype,
    path: str,
) -> None:
    layout = MlaLayout(rank, rope, block_tokens)
    case = mla_case([(c, 1) for c in decodes] + [(s, n) for s, n in rows], layout, dtype)
    inputs = prefill_inputs(case, heads, 12, 10, layout, dtype)
    with registry.force("mla_decode", path), registry.force("mla_prefill", path):
        close(*run_mla_decode(case, heads, layout, dtype))
        if case.batch.decodes < case.rows:
            close(run_mla_prefill(case, inputs), mla_prefill_oracle(case, inputs, rank), 1.5)


@each_path("mla_decode")
def test_rows_that_share_blocks(path: str, dtype: torch.dtype) -> None:
    layout = MlaLayout(64, 16, 16)
    case = mla_case([(70, 1), (48, 1), (95, 1)], layout, dtype, share=3)
    slots = case.batch.slots.long()
    assert torch.equal(case.batch.block_table[slots[0], :3], case.batch.block_table[slots[2], :3])
    with registry.force("mla_decode", path):
        close(*run_mla_decode(case, 4, layout, dtype))


def one_row(case: Case, row: int) -> Case:
    """The case with this decode row alone."""
    b = case.batch
    batch = dataclasses.replace(
        b,
        slots=b.slots[row : row + 1].clone(),
        starts=b.starts[row : row + 1].clone(),
        lengths=b.lengths[row : row + 1].clone(),
        offsets=torch.tensor([0, 1], dtype=torch.int32),
        decodes=1,
    )
    return Case(batch, case.cache, [case.contexts[row]])


@each_path("mla_decode", reference=False)
def test_a_row_does_not_depend_on_its_neighbours_nor_on_threads(path: str, dtype: torch.dtype) -> None:
    """Bit-equal alone, in a batch, with one thread and with three."""
    layout = MlaLayout(96, 16, 32)
    case = mla_case([(c, 1) for c in (3, 1500, 40, 700, 511, 512, 90, 2000)], layout, dtype)
    q = torch.randn(8, 7, layout.width).to(dtype)
    before = cpu.threads()
    try:
        with registry.force("mla_decode", path):
            for count in (1, 3):
                cpu.set_threads(count)
                whole = ops.mla_decode(q[..., :96], q[..., 96:], case.cache, case.batch, SCALE)
                for row in range(8):
                    single = one_row(case, row)
                    at = q[row : row + 1]
                    alone = ops.mla_decode(at[..., :96], at[..., 96:], single.cache, single.batch, SCALE)
                    assert torch.equal(alone[0], whole[row])
    finally:
        cpu.set_threads(before)


def drafted(case: Case, width: int) -> AttentionBatch:
    """The case's only sequence with its last `width` tokens as rows of one token, as a draft comes."""
    context = int(case.batch.starts[0] + case.batch.lengths[0])
    return dataclasses.replace(
        case.batch,
        slots=case.batch.slots[:1].repeat(width),
        starts=torch.arange(context - width, context, dtype=torch.int32),
        lengths=torch.ones(width, dtype=torch.int32),
        offsets=torch.arange(width + 1, dtype=torch.int32),
        decodes=width,
    )


@each_path("mla_decode", reference=False)
@pytest.mark.parametrize(
    ("heads", "start", "rank"), [(3, 40, 64), (16, 509, 64), (64, 1020, 64), (100, 90, 64), (20, 509, 320)]
)
def test_a_draft_has_the_bits_of_its_tokens_alone(
    path: str, dtype: torch.dtype, heads: int, start: int, rank: int
) -> None:
    """Rows of one sequence that follow each other share a pass over its cache; others do not."""
    layout = MlaLayout(rank, 16, 16)
    case = mla_case([(start, 6)], layout, dtype)
    batch = drafted(case, 6)
    q = torch.randn(6, heads, layout.width).to(dtype)

    def run(rows: list[int]) -> Tensor:
        part = dataclasses.replace(
            batch,
            slots=batch.slots[rows].clone(),
            starts=batch.starts[rows].clone(),
            lengths=batch.lengths[rows].clone(),
            offsets=batch.offsets[: len(rows) + 1].clone(),
            decodes=len(rows),
        )
        return ops.mla_decode(q[rows][..., :rank], q[rows][..., rank:], case.cache, part, SCALE)

    with registry.force("mla_decode", path):
        together = run(list(range(6)))
        for row in range(6):
            assert torch.equal(run([row])[0], together[row])
        for order in ([0, 2, 4], [5, 4, 3, 2, 1, 0], [0, 1, 0, 1, 3, 4]):
            assert torch.equal(run(order), together[order])


@each_path("gqa_decode", reference=False)
def test_a_draft_has_the_bits_of_its_tokens_alone_with_grouped_heads(path: str, dtype: torch.dtype) -> None:
    layout = GqaLayout(2, 64, 16)
    case = gqa_case([(600, 5)], layout, dtype)
    batch = drafted(case, 5)
    q = torch.randn(5, 6, 64).to(dtype)
    with registry.force("gqa_decode", path):
        together = ops.gqa_decode(q, case.cache, batch, SCALE)
        for row in range(5):
            alone = one_row(Case(batch, case.cache, case.contexts * 5), row)
            assert torch.equal(ops.gqa_decode(q[row : row + 1], alone.cache, alone.batch, SCALE)[0], together[row])


@each_path("gqa_decode", reference=False)
def test_decode_equals_prefill_of_the_same_token(path: str, dtype: torch.dtype) -> None:
    """However a sequence is cut into chunks and decodes, each token's attention has the same bits."""
    layout = GqaLayout(2, 64, 16)
    case = gqa_case([(600, 70)], layout, dtype)
    q = torch.randn(70, 6, 64).to(dtype)
    with registry.force("gqa_decode", path), registry.force("gqa_prefill", path):
        whole = ops.gqa_prefill(q, case.cache, case.batch, SCALE)
        for first, length in ((0, 13), (13, 1), (14, 56)):
            part = dataclasses.replace(
                case.batch,
                starts=torch.tensor([600 + first], dtype=torch.int32),
                lengths=torch.tensor([length], dtype=torch.int32),
                offsets=torch.tensor([0, length], dtype=torch.int32),
            )
            assert torch.equal(
                ops.gqa_prefill(q[first : first + length], case.cache, part, SCALE), whole[first : first + length]
            )
        decode = dataclasses.replace(
            case.batch,
            starts=torch.tensor([669], dtype=torch.int32),
            lengths=torch.tensor([1], dtype=torch.int32),
            offsets=torch.tensor([0, 1], dtype=torch.int32),
            decodes=1,
        )
        assert torch.equal(ops.gqa_decode(q[69:], case.cache, decode, SCALE)[0], whole[69])


@each_path("mla_decode")
def test_strided_queries(path: str, dtype: torch.dtype) -> None:
    """Queries are slices of one projection, heads and tokens in either order."""
    layout = MlaLayout(64, 16, 16)
    case = mla_case([(30, 1), (99, 1)], layout, dtype)
    q = torch.randn(4, 2, layout.width).to(dtype).transpose(0, 1)  # [n, h, rank + rope] of an [h, n, ..] tensor
    with registry.force("mla_decode", path):
        actual = ops.mla_decode(q[..., :64], q[..., 64:], case.cache, case.batch, SCALE)
    close(actual, mla_decode_oracle(case, q, 64))


@each_path("mla_decode", reference=False)
def test_nothing_to_do(path: str, dtype: torch.dtype) -> None:
    layout = MlaLayout(64, 16, 16)
    batch, total = make_batch([], 16)
    cache = torch.zeros(layout.shape(total), dtype=dtype)
    with registry.force("mla_decode", path):
        out = ops.mla_decode(
            torch.empty(0, 4, 64, dtype=dtype), torch.empty(0, 4, 16, dtype=dtype), cache, batch, SCALE
        )
        none = ops.mla_prefill(
            torch.empty(0, 4, 8, dtype=dtype),
            torch.empty(0, 4, 16, dtype=dtype),
            cache,
            batch,
            torch.zeros(4, 8, 64, dtype=dtype),
            torch.zeros(4, 8, 64, dtype=dtype),
            SCALE,
        )
    assert out.shape == (0, 4, 64)
    assert none.shape == (0, 4, 8)


@each_path("mla_decode", reference=False)
def test_extreme_scores(path: str, dtype: torch.dtype) -> None:
    """One key takes all the weight; scores in the thousands neither overflow nor give NaN."""
    layout = MlaLayout(32, 16, 16)
    case = mla_case([(1200, 1)], layout, dtype)
    q = (torch.randn(1, 4, layout.width) * 1000).to(dtype)
    with registry.force("mla_decode", path):
        actual = ops.mla_decode(q[..., :32], q[..., 32:], case.cache, case.batch, SCALE)
    close(actual, mla_decode_oracle(case, q, 32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": torch.tensor([9, 0], dtype=torch.int32)}, "slot 9"),
        ({"starts": torch.tensor([5, -3], dtype=torch.int32)}, "negative start"),
        ({"starts": torch.tensor([5, 10_000], dtype=torch.int32)}, "longer than block_table"),
        ({"offsets": torch.tensor([0, 7, 8], dtype=torch.int32)}, "outside the queries"),
        ({"slots": torch.tensor([0, 1], dtype=torch.int64)}, "batch.slots is torch.int64"),
        ({"starts": torch.tensor([5], dtype=torch.int32)}, "batch.starts has shape"),
        ({"decodes": 3}, "decodes is 3"),
    ],
)
def test_a_bad_batch_is_refused(change: dict[str, object], message: str) -> None:
    layout = MlaLayout(32, 16, 16)
    case = mla_case([(5, 1), (6, 1)], layout, torch.float32)
    batch = dataclasses.replace(case.batch, **change)
    with pytest.raises(ValueError, match=message):
        ops.mla_decode(torch.zeros(2, 2, 32), torch.zeros(2, 2, 16), case.cache, batch, SCALE)


def test_a_block_outside_the_cache_is_refused() -> None:
    layout = MlaLayout(32, 16, 16)
    for rows in ([(20, 1)], [(20, 3)], [(20, 100)]):
        case = mla_case(rows, layout, torch.float32)
        table = case.batch.block_table.clone()
        table[int(case.batch.slots[0]), 1] = case.cache.shape[0]
        batch = dataclasses.replace(case.batch, block_table=table)
        inputs = prefill_inputs(case, 2, 8, 8, layout, torch.float32)
        with pytest.raises(ValueError, match="not in the cache"):
            if batch.decodes:
                ops.mla_decode(torch.zeros(1, 2, 32), torch.zeros(1, 2, 16), case.cache, batch, SCALE)
            else:
                run_mla_prefill(dataclasses.replace(case, batch=batch), inputs)


def test_bad_tensors_are_refused() -> None:
    layout = MlaLayout(32, 16, 16)
    case = mla_case([(5, 1)], layout, torch.float32)
    good = torch.zeros(1, 2, 32), torch.zeros(1, 2, 16), case.cache
    for latent, rope, cache, message in (
        (good[0].bfloat16(), good[1], good[2], "q_latent is torch.bfloat16"),
        (good[0], torch.zeros(1, 2, 15), good[2], "q_rope has shape"),
        (good[0], good[1], good[2].transpose(0, 1), "cache must be contiguous"),
        (torch.zeros(2, 2, 32), torch.zeros(2, 2, 16), good[2], "2 rows"),
        (torch.zeros(1, 32, 2).transpose(1, 2), good[1], good[2], "last axis must be contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.mla_decode(latent, rope, cache, case.batch, SCALE)
    gqa = gqa_case([(5, 1)], GqaLayout(2, 32, 16), torch.float32)
    with pytest.raises(ValueError, match="multiple of KV heads"):
        ops.gqa_decode(torch.zeros(1, 3, 32), gqa.cache, gqa.batch, SCALE)

"""How a step's tokens are dealt out: each token once, whole rows to their home, equal work along cp."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenrelay.kernels.batch import AttentionBatch
from tokenrelay.runtime.placement import Mesh
from tokenrelay.runtime.spmd import frames
from tokenrelay.runtime.spmd.deal import NOWHERE, Dealt, deal
from tokenrelay.runtime.spmd.homes import at_home, homes_of
from tokenrelay.runtime.spmd.micro import count_batches, cut_step


def batch_of(starts: list[int], lengths: list[int], decodes: int) -> AttentionBatch:
    """Blocks of 16; the i-th row has the blocks from 100 i on."""
    positions = [p for start, length in zip(starts, lengths, strict=True) for p in range(start, start + length)]
    table = torch.arange(len(starts) * 100, dtype=torch.int32).view(-1, 100)
    slots = [1600 * i + p for i, s in enumerate(starts) for p in range(s, s + lengths[i])]
    return AttentionBatch(
        block_table=table,
        slots=torch.arange(len(starts), dtype=torch.int32),
        starts=torch.tensor(starts, dtype=torch.int32),
        lengths=torch.tensor(lengths, dtype=torch.int32),
        offsets=torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int(),
        positions=torch.tensor(positions),
        cache_slots=torch.tensor(slots),
        decodes=decodes,
        context_max=max(s + n for s, n in zip(starts, lengths, strict=True)),
    )


@st.composite
def steps(draw: st.DrawFn) -> tuple[AttentionBatch, Mesh, list[int], torch.Tensor]:
    mesh = draw(st.sampled_from([Mesh(dp=2), Mesh(cp=2), Mesh(cp=4), Mesh(dp=2, cp=2), Mesh(dp=3, tp=2)]))
    decodes = draw(st.integers(0, 5))
    lengths = [1] * decodes + draw(st.lists(st.integers(1, 90), min_size=0 if decodes else 1, max_size=4))
    starts = [draw(st.integers(1 if i < decodes else 0, 99)) for i in range(len(lengths))]
    homes = [draw(st.integers(0, mesh.size("dp") - 1)) for _ in lengths]
    sampled = torch.tensor(sorted(draw(st.sets(st.integers(0, sum(lengths) - 1)))), dtype=torch.int64)
    return batch_of(starts, lengths, decodes), mesh, homes, sampled


def parts(batch: AttentionBatch, mesh: Mesh, homes: list[int], sampled: torch.Tensor) -> list[Dealt]:
    ids = torch.arange(len(batch.positions)) + 7
    return [deal(ids, batch, sampled, homes, mesh, mesh.coordinates(rank)) for rank in range(mesh.ranks)]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(steps())
def test_each_token_is_computed_once_and_written_where_it_belongs(
    step: tuple[AttentionBatch, Mesh, list[int], torch.Tensor],
) -> None:
    batch, mesh, homes, sampled = step
    dealt = [
        part for part, rank in zip(parts(*step), range(mesh.ranks), strict=True) if not mesh.coordinates(rank)["tp"]
    ]
    real = [part.token_ids[: len(part.batch.positions)] for part in dealt]
    assert sorted(torch.cat(real).tolist()) == list(range(7, 7 + len(batch.positions)))
    assert len({len(part.token_ids) for part in dealt}) == len({len(part.sample_rows) for part in dealt}) == 1
    for part, ids in zip(dealt, real, strict=True):
        at = (ids - 7).tolist()
        assert torch.equal(part.batch.positions, batch.positions[at])
        assert torch.equal(part.batch.cache_slots, batch.cache_slots[at])
        assert part.batch.offsets[-1] == len(at) and (part.batch.lengths[: part.batch.decodes] == 1).all()
        for row in range(len(part.batch.starts)):  # a row's positions follow from its start
            first, end = part.batch.offsets[row], part.batch.offsets[row + 1]
            span = torch.arange(int(part.batch.starts[row]), int(part.batch.starts[row] + end - first))
            assert torch.equal(part.batch.positions[first:end], span)
    for home in range(mesh.size("dp")):
        group = dealt[home * mesh.size("cp") : (home + 1) * mesh.size("cp")]
        mine = torch.cat(
            [batch.cache_slots[batch.offsets[r] : batch.offsets[r + 1]] for r, h in enumerate(homes) if h == home]
            or [torch.empty(0)]
        )
        for part in group:
            written = part.keys[1][part.keys[1] != NOWHERE]
            assert sorted(written.tolist()) == sorted(mine.tolist()), "keys of the group's rows, of nobody else's"
    gathered = torch.cat([part.token_ids[part.sample_rows] for part in dealt])
    assert torch.equal(gathered[dealt[0].order], sampled + 7), "sampled rows come back in order"


def test_a_long_prompt_costs_each_rank_the_same() -> None:
    """Zigzag: pairs of pieces, so that causal attention over them is equal work (within a token)."""
    batch = batch_of([0], [800], 0)
    work = [int((part.batch.positions + 1).sum()) for part in parts(batch, Mesh(cp=4), [0], torch.tensor([799]))]
    assert max(work) == min(work)
    assert [part.batch.lengths.tolist() for part in parts(batch, Mesh(cp=4), [0], torch.tensor([799]))] == [
        [100, 100]
    ] * 4


def test_a_row_is_computed_where_its_blocks_are() -> None:
    """Of three parts of 100 blocks, which every rank numbers from 0."""
    batch = batch_of([20, 20, 0], [1, 1, 5], 2)
    batch.block_table[0] += 200
    batch = replace(batch, cache_slots=batch.cache_slots + torch.tensor([200 * 16, 0, *[-100 * 16] * 5]))
    batch.block_table[2] -= 100
    assert homes_of(batch, 100) == [2, 1, 1]
    first, second = at_home(batch, 2, 100, 16), at_home(batch, 1, 100, 16)
    assert first.block_table[0].tolist() == [0, 1] and first.cache_slots[0] == 20
    assert second.block_table[1:].tolist() == [[0, 1], [0, 1]]
    assert second.cache_slots[1:].tolist() == [20, *range(5)]
    assert batch.block_table[0, 0] == 200, "the scheduler's table is left alone"


def test_a_step_reaches_followers() -> None:
    batch = batch_of([20, 21, 3], [1, 1, 5], 2)
    for groups in (None, torch.tensor([0, 2], dtype=torch.int32)):
        sent = replace(batch, groups=groups, group_max=1 if groups is None else 2)
        ids, found, rows = frames.unpack_step(frames.pack_step(torch.arange(7), sent, torch.tensor([0, 6]), 16))
        assert ids.tolist() == list(range(7)) and rows.tolist() == [0, 6]
        assert torch.equal(found.cache_slots, batch.cache_slots) and found.decodes == 2
        assert found.extents == ((20, 1), (21, 1), (3, 5)) and found.group_max == sent.group_max
        assert found.groups is None if groups is None else found.groups.tolist() == [0, 2]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(steps(), st.integers(1, 6))
def test_micro_batches_have_each_token_once_and_in_order(
    step: tuple[AttentionBatch, Mesh, list[int], torch.Tensor], count: int
) -> None:
    batch, mesh, homes, sampled = step
    ids = torch.arange(len(batch.positions)) + 7
    cut = cut_step(ids, batch, sampled, homes, count)
    assert len(cut) <= count
    assert sorted(torch.cat([part.token_ids for part in cut]).tolist()) == ids.tolist()
    done = dict.fromkeys(range(len(homes)), 0)  # a piece comes when all before it have been computed
    for part in cut:
        at = part.token_ids - 7
        assert torch.equal(part.batch.positions, batch.positions[at])
        assert torch.equal(part.batch.cache_slots, batch.cache_slots[at])
        assert torch.equal(part.token_ids[part.sample_rows] - 7, sampled[part.sampled])
        for row, (start, length) in enumerate(
            zip(part.batch.starts.tolist(), part.batch.lengths.tolist(), strict=True)
        ):
            whole = int(part.batch.slots[row])
            assert part.homes[row] == homes[whole]
            assert start == int(batch.starts[whole]) + done[whole]
            done[whole] += length
    assert sorted(torch.cat([part.sampled for part in cut]).tolist()) == list(range(len(sampled)))
    for home in range(mesh.size("dp")):
        tokens = [sum(n for n, h in zip(p.batch.lengths.tolist(), p.homes, strict=True) if h == home) for p in cut]
        assert max(tokens) - min([*tokens, *[0] * (len(cut) < count)]) <= len(homes), "each part costs a rank the same"


def test_how_many_micro_batches() -> None:
    assert count_batches(4096, 1, 1) == 1, "nobody waits for another stage"
    assert [count_batches(tokens, 1, 2) for tokens in (1, 255, 256, 1024, 9000)] == [1, 1, 2, 8, 8]
    assert count_batches(1024, 4, 2) == 2, "each of four ranks has a quarter of the tokens"

"""How a step's tokens are dealt out: each token once, whole rows to their home, equal work along cp."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenrelay.kernels.batch import AttentionBatch
from tokenrelay.runtime.placement import Mesh
from tokenrelay.runtime.spmd import frames
from tokenrelay.runtime.spmd.deal import NOWHERE, Dealt, deal
from tokenrelay.runtime.spmd.homes import Copy, Homes


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


def test_rows_stay_with_their_blocks() -> None:
    homes = Homes(2, 16)
    homes.allocate(400)
    first, copies = homes.choose(batch_of([0, 0], [20, 20], 0))
    assert sorted(first) == [0, 1] and not copies
    batch = batch_of([20, 20, 0], [1, 1, 5], 2)
    again, copies = homes.choose(batch)
    assert again[:2] == first and not copies
    batch.block_table[2, :2] = torch.tensor([0, 101])  # a prefix of both
    batch.starts[2] = 32
    shared, copies = homes.choose(batch)
    lacks = 0 if shared[2] == first[1] else 101
    assert copies == [Copy(first[0] if lacks == 0 else first[1], shared[2], (lacks,))]
    assert homes.choose(batch)[1] == [], "both hold it now"


def test_homes_and_copies_reach_followers() -> None:
    batch = batch_of([20, 3], [1, 5], 1)
    copies = [Copy(0, 1, (3, 4)), Copy(1, 0, (7,))]
    payload = frames.pack_step(torch.arange(6), batch, torch.tensor([0]), 16, [1, 0], copies)
    ids, found, rows, homes, moved = frames.unpack_step(payload)
    assert ids.tolist() == list(range(6)) and rows.tolist() == [0] and homes == [1, 0] and moved == copies
    assert torch.equal(found.cache_slots, batch.cache_slots) and found.decodes == 1

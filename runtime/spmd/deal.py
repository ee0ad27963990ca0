"""Which tokens of a step a rank computes, where tokens are dealt out over dp and cp.

    dealt = deal(token_ids, batch, sample_rows, homes=[0, 1, 0], mesh=Mesh(dp=2, cp=2), at=mesh.coordinates(rank))

Rows go whole to their home along dp. Along cp a decode row goes to one rank, and a prefill row is cut into two pieces
for each rank, the i-th from the front and the i-th from the back (zigzag: causal attention costs more at the end, so
each rank's pair costs the same; arXiv:2407.21783, section 3.3.2). All ranks compute equally many tokens: what is
missing is padding, which is never written to a cache and never attends. Every rank works out the same from the same
step, so nothing is sent for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenrelay.kernels.batch import AttentionBatch
from tokenrelay.runtime.placement import Mesh
from tokenrelay.runtime.placement.passes import SPLIT_TOKENS_MIN

NOWHERE = -1  # the cache slot of padding
Piece = tuple[int, int, int]  # a row of the step, its first token that is meant, how many


@dataclass(frozen=True, slots=True)
class Dealt:
    """One rank's part of a step: t tokens, the real ones first, and s sampled rows."""

    token_ids: Tensor  # int64 [t]
    positions: Tensor  # int64 [t]
    batch: AttentionBatch  # of the real tokens
    sample_rows: Tensor  # int64 [s]
    keys: tuple[Tensor, Tensor]  # int64 [cp * t]: position and cache slot of each token whose key this rank gets
    order: Tensor  # int64: where among the gathered logits each sampled row of the step stands


def deal(
    token_ids: Tensor,
    batch: AttentionBatch,
    sample_rows: Tensor,
    homes: Sequence[int],
    mesh: Mesh,
    at: dict[str, int],
) -> Dealt:
    """The part of the rank at `at`. `homes`: the place along dp of each row of the step."""
    places = _pieces(batch, homes, mesh)
    offsets = batch.offsets.tolist()
    mine = at["dp"] * mesh.size("cp") + at["cp"]
    indices = [indices_of(pieces, offsets) for pieces in places]
    tp = mesh.size("tp")
    tokens = max(1, max(map(len, indices)))
    wide = tokens >= tp * SPLIT_TOKENS_MIN  # enough for the program that cuts tokens over tp as well
    tokens = -(-tokens // tp) * tp if wide else tokens
    rows, order = _sampled(indices, sample_rows, len(token_ids), tp if wide else 1)
    first = at["dp"] * mesh.size("cp")
    group = indices[first : first + mesh.size("cp")]
    keys = [_padded(batch.positions, index, tokens, 0) for index in group]
    slots = [_padded(batch.cache_slots, index, tokens, NOWHERE) for index in group]
    return Dealt(
        token_ids=_padded(token_ids, indices[mine], tokens, 0),
        positions=keys[at["cp"]],
        batch=take_pieces(batch, places[mine], indices[mine]),
        sample_rows=rows[mine],
        keys=(torch.cat(keys), torch.cat(slots)),
        order=order,
    )


def _pieces(batch: AttentionBatch, homes: Sequence[int], mesh: Mesh) -> list[list[Piece]]:
    """By place (dp, then cp): decode rows first."""
    cp = mesh.size("cp")
    decoded: list[list[Piece]] = [[] for _ in range(mesh.size("dp") * cp)]
    prefilled: list[list[Piece]] = [[] for _ in decoded]
    next_of = [0] * mesh.size("dp")
    for row, (home, length) in enumerate(zip(homes, batch.lengths.tolist(), strict=True)):
        group = home * cp
        if row < batch.decodes or length < 2 * cp:
            into = decoded if row < batch.decodes else prefilled
            into[group + next_of[home] % cp].append((row, 0, length))
            next_of[home] += 1
            continue
        bounds = [length * i // (2 * cp) for i in range(2 * cp + 1)]
        for i in range(2 * cp):
            place = group + min(i, 2 * cp - 1 - i)
            prefilled[place].append((row, bounds[i], bounds[i + 1] - bounds[i]))
    return [first + then for first, then in zip(decoded, prefilled, strict=True)]


def indices_of(pieces: list[Piece], offsets: list[int]) -> Tensor:
    """Where the pieces' tokens stand in the step: int64."""
    ranges = [torch.arange(offsets[row] + first, offsets[row] + first + count) for row, first, count in pieces]
    return torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.int64)


def _padded(values: Tensor, index: Tensor, count: int, padding: int) -> Tensor:
    made = torch.full((count,), padding, dtype=torch.int64)
    made[: len(index)] = values[index]
    return made


def _sampled(indices: list[Tensor], sample_rows: Tensor, tokens: int, multiple: int) -> tuple[list[Tensor], Tensor]:
    """(the sampled rows of each place, as many for each; where each of `sample_rows` stands when they are gathered)."""
    place_of = torch.empty(tokens, dtype=torch.int64)
    local_of = torch.empty(tokens, dtype=torch.int64)
    for place, index in enumerate(indices):
        place_of[index] = place
        local_of[index] = torch.arange(len(index))
    places, local = place_of[sample_rows], local_of[sample_rows]
    counts = torch.bincount(places, minlength=len(indices)) if len(places) else torch.zeros(1, dtype=torch.int64)
    count = -(-int(counts.max()) // multiple) * multiple
    rows, order = [], torch.empty(len(sample_rows), dtype=torch.int64)
    for place in range(len(indices)):
        chosen = torch.nonzero(places == place).flatten()
        order[chosen] = place * count + torch.arange(len(chosen))
        rows.append(_padded(local, chosen, count, 0))
    return rows, order


def take_pieces(batch: AttentionBatch, pieces: list[Piece], index: Tensor) -> AttentionBatch:
    """The batch of some pieces, decode rows first; `index`: where their tokens stand in the step."""
    rows = torch.tensor([row for row, _, _ in pieces], dtype=torch.int64)
    firsts = torch.tensor([first for _, first, _ in pieces], dtype=torch.int32)
    lengths = torch.tensor([count for _, _, count in pieces], dtype=torch.int32)
    starts = batch.starts[rows] + firsts
    offsets = torch.zeros(len(pieces) + 1, dtype=torch.int32)
    torch.cumsum(lengths, 0, out=offsets[1:])
    return AttentionBatch(
        block_table=batch.block_table,
        slots=batch.slots[rows],
        starts=starts,
        lengths=lengths,
        offsets=offsets,
        positions=batch.positions[index],
        cache_slots=batch.cache_slots[index],
        decodes=sum(row < batch.decodes for row, _, _ in pieces),
        context_max=int((starts + lengths).max()) if pieces else 0,
    )

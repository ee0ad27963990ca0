"""A step in micro-batches, so that pipeline stages overlap: each works on a part while the next has the one before.

    for micro_batch in cut_step(token_ids, batch, sample_rows, homes, count=4): ...

With m parts and s stages the last stage is done after m + s - 1 turns of a part each, instead of s turns of the whole
step (arXiv:1811.06965). Each part reads the weights anew, which pays where a part has enough tokens to keep a device
busy with them: a small step stays whole. Every row is cut into as many pieces, in order: a piece reads the keys that
the ones before it wrote, in any stage. All ranks cut alike, from the same step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenrelay.kernels.batch import AttentionBatch
from tokenrelay.runtime.spmd.deal import Piece, indices_of, take_pieces

MICRO_TOKENS_MIN = 128  # of each rank: from about so many on a matrix product is bound by computing, not by its weights
STAGE_BATCHES_MAX = 4  # for each stage: with so many a stage waits for a fifth of the time, at most


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Some pieces of each row: t tokens, s of the step's sampled rows."""

    token_ids: Tensor  # int64 [t]
    batch: AttentionBatch
    sample_rows: Tensor  # int64 [s] among these tokens
    homes: list[int]  # of its rows
    sampled: Tensor  # int64 [s]: which of the step's sampled rows these are


def count_batches(tokens: int, places: int, stages: int, micro_tokens_min: int = MICRO_TOKENS_MIN) -> int:
    """Parts for a step of so many tokens, dealt out to `places`; 1: it stays whole."""
    return max(1, min(STAGE_BATCHES_MAX * stages, tokens // (places * micro_tokens_min))) if stages > 1 else 1


def cut_step(
    token_ids: Tensor, batch: AttentionBatch, sample_rows: Tensor, homes: Sequence[int], count: int
) -> list[MicroBatch]:
    """At most `count` parts, each with the same share of every home's tokens; parts without tokens are left out."""
    offsets = batch.offsets.tolist()
    sampled_at = torch.full((len(token_ids),), -1, dtype=torch.int64)
    sampled_at[sample_rows] = torch.arange(len(sample_rows))
    parts = []
    for pieces in _pieces(batch, homes, count):
        if not pieces:
            continue
        index = indices_of(pieces, offsets)
        sampled = sampled_at[index]
        chosen = torch.nonzero(sampled >= 0).flatten()
        part = take_pieces(batch, pieces, index)
        parts.append(MicroBatch(token_ids[index], part, chosen, [homes[row] for row, _, _ in pieces], sampled[chosen]))
    return parts


def _pieces(batch: AttentionBatch, homes: Sequence[int], count: int) -> list[list[Piece]]:
    """By part. Rows of one token go to parts in order: those of a draft are of one sequence, one behind the other."""
    found: list[list[Piece]] = [[] for _ in range(count)]
    decodes = batch.decodes
    total, seen = [0] * (max(homes, default=0) + 1), [0] * (max(homes, default=0) + 1)
    for home in homes[:decodes]:
        total[home] += 1
    for row, (home, length) in enumerate(zip(homes, batch.lengths.tolist(), strict=True)):
        if row < decodes:
            found[seen[home] * count // total[home]].append((row, 0, length))
            seen[home] += 1
            continue
        bounds = [length * i // count for i in range(count + 1)]
        for part in range(count):
            if bounds[part] < bounds[part + 1]:
                found[part].append((row, bounds[part], bounds[part + 1] - bounds[part]))
    return found

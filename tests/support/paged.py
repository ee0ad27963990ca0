"""Drives a model over paged caches by hand: sequences with shuffled block tables, shared prefix blocks, any step.

paged = Paged(model, blocks=64)
a = paged.add([1, 2, 3]); b = paged.add([4, 5])
logits = paged.step({a: 1, b: 2})      # a computes one token, b two; decode rows first; rows of `logits` by sequence
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenrelay.kernels.ops import AttentionBatch

SEQUENCES_MAX = 16


@dataclass
class Row:
    """One sequence: its tokens, how many of them have KV, its slot in the block table and its blocks."""

    tokens: list[int]
    slot: int
    part: int = 0  # that its blocks are of
    done: int = 0
    blocks: list[int] = field(default_factory=list)


class Paged:
    """Caches, a block table and the sequences in it."""

    def __init__(self, model: Any, *, blocks: int = 64, seed: int = 0) -> None:
        self.model = model
        layout = model.config.kv_layout
        self.block_tokens: int = layout.block_tokens
        dtype = model.config.kv_dtype
        # Poison: whoever reads a slot that nobody wrote gets NaN.
        parts = getattr(model, "parts", 1)  # a model of several ranks along dp: each has a part of the blocks
        shape = layout.shape(blocks // parts)
        self.caches = [torch.full(shape, float("nan"), dtype=dtype) for _ in range(model.config.layers)]
        self.block_table = torch.full((SEQUENCES_MAX, blocks), -1, dtype=torch.int32)
        order = random.Random(seed)
        self.free = [list(range(i * blocks // parts, (i + 1) * blocks // parts)) for i in range(parts)]
        for free in self.free:
            order.shuffle(free)
        self.slots = list(range(SEQUENCES_MAX))
        order.shuffle(self.slots)
        self.rows: list[Row] = []

    def add(self, tokens: Sequence[int], *, prefix_of: int | None = None, prefix_blocks: int = 0) -> int:
        """A new sequence; with `prefix_of` its first `prefix_blocks` full blocks are that sequence's, KV and all."""
        row = Row(list(tokens), self.slots.pop(), len(self.rows) % len(self.free))
        if prefix_of is not None:
            row.blocks = self.rows[prefix_of].blocks[:prefix_blocks]
            row.part = self.rows[prefix_of].part
            row.done = prefix_blocks * self.block_tokens
            assert self.rows[prefix_of].tokens[: row.done] == row.tokens[: row.done]
            assert row.done < len(row.tokens) and row.done <= self.rows[prefix_of].done
        self.rows.append(row)
        return len(self.rows) - 1

    def batch(self, lengths: Mapping[int, int]) -> tuple[Tensor, AttentionBatch, list[int]]:
        """Inputs of a step that computes `lengths[sequence]` tokens of each sequence: (token ids, batch, row order)."""
        order = sorted(lengths, key=lambda i: not (lengths[i] == 1 and self.rows[i].done > 0))
        decodes = sum(lengths[i] == 1 and self.rows[i].done > 0 for i in order)
        positions: list[int] = []
        cache_slots: list[int] = []
        tokens: list[int] = []
        for i in order:
            row = self.rows[i]
            span = range(row.done, row.done + lengths[i])
            while len(row.blocks) * self.block_tokens < span.stop:
                row.blocks.append(self.free[row.part].pop())
            self.block_table[row.slot, : len(row.blocks)] = torch.tensor(row.blocks, dtype=torch.int32)
            tokens += [row.tokens[p] for p in span]
            positions += span
            cache_slots += [
                row.blocks[p // self.block_tokens] * self.block_tokens + p % self.block_tokens for p in span
            ]
        starts = [self.rows[i].done for i in order]
        counts = [lengths[i] for i in order]
        offsets = [0]
        for count in counts:
            offsets.append(offsets[-1] + count)
        batch = AttentionBatch(
            block_table=self.block_table,
            slots=torch.tensor([self.rows[i].slot for i in order], dtype=torch.int32),
            starts=torch.tensor(starts, dtype=torch.int32),
            lengths=torch.tensor(counts, dtype=torch.int32),
            offsets=torch.tensor(offsets, dtype=torch.int32),
            positions=torch.tensor(positions, dtype=torch.int64),
            cache_slots=torch.tensor(cache_slots, dtype=torch.int64),
            decodes=decodes,
            context_max=max(start + count for start, count in zip(starts, counts, strict=True)),
        )
        return torch.tensor(tokens, dtype=torch.int64), batch, order

    def step(self, lengths: Mapping[int, int], *, every: bool = False) -> dict[int, Tensor]:
        """Run one step. Logits by sequence: [vocab] after its last token, or [length, vocab] with `every`."""
        token_ids, batch, order = self.batch(lengths)
        ends = batch.offsets[1:].long() - 1
        rows = torch.arange(len(token_ids)) if every else ends
        logits = self.model(token_ids, batch, self.caches, rows)
        for i in order:
            self.rows[i].done += lengths[i]
        if not every:
            return {i: logits[n] for n, i in enumerate(order)}
        parts = logits.split([lengths[i] for i in order])
        return dict(zip(order, parts, strict=True))

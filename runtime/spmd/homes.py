"""Which rank along dp computes a row of a step, and the step as that rank's caches have it.

The scheduler's pool has a part for each place along dp, of as many blocks, and a sequence's blocks are of one part: its
home has that part's KV and no other. A block's number within its part is its place in the caches there. Every rank
works this out from the step alone.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from tokenrelay.kernels.batch import AttentionBatch


def homes_of(batch: AttentionBatch, part_blocks: int) -> list[int]:
    """The place along dp of each row: where its first block is."""
    found: list[int] = (batch.block_table[batch.slots.long(), 0] // part_blocks).tolist()
    return found


def at_home(batch: AttentionBatch, place: int, part_blocks: int, block_tokens: int) -> AttentionBatch:
    """The batch with blocks numbered as they are in the part of `place`; what is in other parts has no meaning."""
    columns = -(-batch.context_max // block_tokens)
    table = batch.block_table[batch.slots.long(), :columns] - place * part_blocks
    return replace(
        batch,
        block_table=table.clamp_(0, part_blocks - 1),  # nobody reads the entries of other parts, nor the unused ones
        slots=torch.arange(len(batch.slots), dtype=torch.int32),
        cache_slots=batch.cache_slots - place * part_blocks * block_tokens,
    )

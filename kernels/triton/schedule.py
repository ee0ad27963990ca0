"""How the work of an attention call is dealt to the device's programs, computed on the device.

A **segment** is a run of queries of one sequence: a decode row, a draft's rows, a chunk of a prompt. Its rows (queries
x heads that read the same cache entries) are cut into tiles; a **unit** is one such tile, and reads the cache up to its
last query. Along the cache a unit is cut into steps of `block_n` tokens. All units' steps stand on one axis:

    unit 0        unit 1              unit 2
    |------------|-------------------|------|      cum[u]: where unit u begins
    |---------|---------|---------|---------|      share: steps of one program (balanced)

Balanced: program p runs steps [p * share, (p + 1) * share), so all programs end together whatever the lengths. A unit
that one program runs whole is finished there; else each piece leaves its running maximum, sum and vectors at place
p + u of a scratch buffer (which no other piece has: along the axis p + u only grows), and `merge` adds them in order.

Fixed: a unit is cut every `split` steps from its start, whatever else is in the batch, and the axis counts those
pieces. The bits of a row then depend on its own context alone.

Everything here has sizes known to the host and values known to the device only: nothing waits, and a captured graph
computes it anew from the batch's buffers at each replay.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenrelay.kernels.batch import AttentionBatch
from tokenrelay.kernels.triton.arch import processors

SPLIT_TOKENS = 2048  # of a piece in fixed mode; shorter ones fill more of the device, longer ones need less scratch
SHARE_STEPS_MIN = 2  # a piece of one step costs more to merge than it saves


@dataclass(frozen=True, slots=True)
class Tiling:
    """How one kind of attention cuts its work."""

    rows: int  # heads that read the same cache entries
    outer: int  # groups of such heads (KV heads); 1 for latents
    block_m: int
    block_n: int
    fixed: bool  # cut at fixed places rather than by load
    warps: int = 4
    stages: int = 2  # of the software pipeline
    programs: int = 1  # of one multiprocessor at a time


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """The answer; tensors int32 on the device."""

    first: Tensor  # [s] token of the segment's first query, counted from the first query of the call
    lengths: Tensor  # [s] queries
    starts: Tensor  # [s] position of the first query
    slots: Tensor  # [s] row of the block table
    segment: Tensor  # [u] of each unit
    tile: Tensor  # [u] group of heads * tiles + tile of rows, within its segment
    steps: Tensor  # [u]
    cum: Tensor  # [u + 1]: steps (balanced) or pieces (fixed) before unit u
    share: Tensor  # [1]: of the axis, for each program
    units: int
    parts: int  # programs
    places: int  # of the scratch buffer
    split: int  # steps of a piece in fixed mode

    @property
    def arrays(self) -> tuple[Tensor | int, ...]:
        """What the attention kernels take, in their order: `first` to `units`."""
        return (
            self.first,
            self.lengths,
            self.starts,
            self.slots,
            self.segment,
            self.tile,
            self.steps,
            self.cum,
            self.share,
            self.units,
        )

    def scratch(self, block_m: int, width: int) -> tuple[Tensor, Tensor]:
        """For the pieces of units that are cut: float32 vectors [places * block_m, width], and their running maximum
        and sum [places * block_m, 2]."""
        rows, device = self.places * block_m, self.first.device
        vectors = torch.empty((rows, width), dtype=torch.float32, device=device)
        return vectors, torch.empty((rows, 2), dtype=torch.float32, device=device)


_Key = tuple[Tiling, bool]
_last: tuple[AttentionBatch | None, dict[_Key, Work]] = (None, {})


def work_of(batch: AttentionBatch, tiling: Tiling, *, decode: bool) -> Work:
    """The work of the decode rows, or of the others. All layers of a step pass the same batch: it is found once."""
    global _last
    last, found = _last
    if last is not batch:
        found = {}
        _last = (batch, found)
    key = (tiling, decode)
    if key not in found:
        found[key] = _deal(batch, tiling, decode)
    return found[key]


def _segments(batch: AttentionBatch, decode: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int]:
    """first, lengths, starts, slots, the number of queries, and how many one segment has at most."""
    rows, decodes = batch.slots.shape[0], batch.decodes
    if decode and batch.groups is None:
        first = torch.arange(decodes, dtype=torch.int32, device=batch.starts.device)
        return first, batch.lengths[:decodes], batch.starts[:decodes], batch.slots[:decodes], decodes, 1
    if decode:
        assert batch.groups is not None
        first = batch.groups[:-1]
        at = first.clamp(max=max(decodes - 1, 0)).long()  # a group of no rows has no first one
        lengths = batch.groups[1:] - first
        return first, lengths, batch.starts[:decodes][at], batch.slots[:decodes][at], decodes, batch.group_max
    tokens = batch.positions.shape[0] - decodes
    first = batch.offsets[decodes:rows] - decodes
    return first, batch.lengths[decodes:], batch.starts[decodes:], batch.slots[decodes:], tokens, tokens


def _deal(batch: AttentionBatch, tiling: Tiling, decode: bool) -> Work:
    first, lengths, starts, slots, tokens, longest = _segments(batch, decode)
    rows, outer, block_m, block_n = tiling.rows, tiling.outer, tiling.block_m, tiling.block_n
    device = starts.device
    segments = first.shape[0]
    per_segment = -(-longest * rows // block_m)
    units = outer * min(segments * per_segment, -(-tokens * rows // block_m) + segments)
    m_tiles = (lengths.clamp(min=0) * rows + (block_m - 1)) // block_m  # [s]
    ends = torch.cumsum(m_tiles * outer, 0, dtype=torch.int32)  # [s]: units up to and with each segment
    unit = torch.arange(units, dtype=torch.int32, device=device)
    segment = torch.searchsorted(ends, unit, right=True).clamp(max=segments - 1)  # [u]
    tile = unit - (ends[segment] - m_tiles[segment] * outer)
    in_group = tile % m_tiles[segment].clamp(min=1)
    last_row = torch.minimum((in_group + 1) * block_m, lengths[segment] * rows) - 1
    context = starts[segment] + last_row // rows + 1
    context = torch.where(unit < ends[-1], context, 0).clamp(min=0)  # units beyond the last one have nothing to do
    steps = (context + (block_n - 1)) // block_n
    split = max(1, SPLIT_TOKENS // block_n)
    parts = processors(device) * tiling.programs
    if tiling.fixed:
        pieces = (steps + (split - 1)) // split
        pieces_max = units * max(1, -(-batch.context_max // (split * block_n)))
        share_min, places, parts = 1, pieces_max, min(parts * 2, pieces_max)
    else:
        pieces, share_min, places = steps, SHARE_STEPS_MIN, parts + units
    cum = torch.zeros(units + 1, dtype=torch.int32, device=device)
    torch.cumsum(pieces, 0, dtype=torch.int32, out=cum[1:])
    share = ((cum[-1:] + (parts - 1)) // parts).clamp(min=share_min)
    return Work(
        first=first.contiguous(),
        lengths=lengths.contiguous(),
        starts=starts.contiguous(),
        slots=slots.contiguous(),
        segment=segment.to(torch.int32),
        tile=tile.to(torch.int32),
        steps=steps.to(torch.int32),
        cum=cum,
        share=share.to(torch.int32),
        units=units,
        parts=parts,
        places=places,
        split=split,
    )

"""Plan -> Batch: the tensors of one step, made once and shared by all layers.

Vector operations only: a step of 64 decode rows costs as many Python calls as a step of one.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokenrelay.kernels.batch import AttentionBatch
from tokenrelay.kernels.step import HostSteps
from tokenrelay.libscheduler import Plan

if TYPE_CHECKING:
    from tokenrelay.kernels._cpu import HostStep


@dataclass(frozen=True, slots=True)
class Batch:
    """t tokens of n rows, s of them sampled; the tensors are on the model's device.

    Rows with a draft are cut into rows of one token (`rows_of`), so several decode rows may have the same slot.
    """

    token_ids: Tensor  # int64 [t]
    feedback_at: Tensor | None  # int64 [f] positions in token_ids that the device fills from what it sampled last
    feedback_slots: Tensor | None  # int64 [f] whose token goes there
    attention: AttentionBatch
    sample_rows: Tensor  # int64 [s] token indices after which a token is sampled
    sample_slots: npt.NDArray[np.int64]  # [s] host
    sample_slots_device: Tensor  # int64 [s]
    sample_ends: npt.NDArray[np.int64]  # [s] host: tokens of the sequence before the sampled one
    tails: tuple[tuple[int, int, int], ...] = ()  # block, block, tokens: KV that is copied before anything else


def batch_of(steps: HostSteps, step: HostStep, tails: tuple[tuple[int, int, int], ...]) -> Batch:
    """The tensors of a step that a native call made: views of its memory."""
    inputs, fed = steps.inputs(step), step.fed > 0
    return Batch(
        token_ids=inputs.token_ids,
        feedback_at=inputs.fed_at if fed else None,
        feedback_slots=inputs.fed_slots if fed else None,
        attention=steps.attention(step),
        sample_rows=inputs.sample_rows,
        sample_slots=inputs.sample_slots.numpy(),
        sample_slots_device=inputs.sample_slots,
        sample_ends=inputs.sample_ends.numpy(),
        tails=tails,
    )


class BatchBuilder:
    """Makes batches over the scheduler's persistent block table."""

    def __init__(self, block_table: npt.NDArray[np.int32], block_tokens: int, device: torch.device) -> None:
        self._table = block_table
        self._shift = block_tokens.bit_length() - 1
        self._mask = block_tokens - 1
        self._device = device
        self._table_view = shared(block_table) if device.type == "cpu" else None

    def build(self, plan: Plan) -> Batch:
        """The tensors of `plan`. Reads the block table as it is now, so call it before the next plan is made."""
        row = rows_of(plan)
        slots, starts, lengths = row.slots, row.starts, row.lengths
        rows = len(slots)
        ends = starts + lengths
        offsets = np.zeros(rows + 1, dtype=np.int32)
        np.cumsum(lengths, out=offsets[1:])
        if row.decodes == rows:
            positions = starts.astype(np.int64)
            blocks = self._table[slots, starts >> self._shift]
        else:
            row_of = np.repeat(np.arange(rows), lengths)
            positions = np.arange(offsets[-1], dtype=np.int64) + (starts - offsets[:-1])[row_of]
            blocks = self._table[slots[row_of], positions >> self._shift]
        cache_slots = (blocks.astype(np.int64) << self._shift) | (positions & self._mask)
        context_max = int(ends.max())
        sampled = np.flatnonzero(row.samples)
        sample_slots = slots[sampled].astype(np.int64)
        feedback = np.flatnonzero(row.feedback)
        table, table_slots = self._table_of(slots, context_max)
        return Batch(
            token_ids=self._to_device(plan.token_ids.astype(np.int64)),
            feedback_at=self._to_device(offsets[feedback].astype(np.int64)) if feedback.size else None,
            feedback_slots=self._to_device(slots[feedback].astype(np.int64)) if feedback.size else None,
            attention=AttentionBatch(
                block_table=table,
                slots=table_slots,
                starts=self._to_device(starts.copy()),
                lengths=self._to_device(lengths.copy()),
                offsets=self._to_device(offsets),
                positions=self._to_device(positions),
                cache_slots=self._to_device(cache_slots),
                decodes=row.decodes,
                context_max=context_max,
                **self._told(row, starts, lengths),
            ),
            sample_rows=self._to_device(offsets[1:][sampled].astype(np.int64) - 1),
            sample_slots=sample_slots,
            sample_slots_device=self._to_device(sample_slots),
            sample_ends=ends[sampled].astype(np.int64),
            tails=tails_of(plan),
        )

    def _table_of(self, slots: npt.NDArray[np.int32], context_max: int) -> tuple[Tensor, Tensor]:
        """The block table as the kernels read it: the scheduler's own on a CPU, the rows in use elsewhere."""
        if self._table_view is not None:
            return self._table_view, torch.from_numpy(slots.copy())
        used = (context_max + self._mask) >> self._shift
        rows = np.ascontiguousarray(self._table[slots, :used])
        return self._to_device(rows), torch.arange(len(slots), dtype=torch.int32, device=self._device)

    def _told(self, row: Rows, starts: npt.NDArray[np.int32], lengths: npt.NDArray[np.int32]) -> dict[str, Any]:
        """What kernels elsewhere than on a CPU want to know without asking the device."""
        told: dict[str, Any] = {}
        if self._device.type == "cpu":
            return told
        if row.decodes < len(starts):
            told["extents"] = tuple(zip(starts.tolist(), lengths.tolist(), strict=True))
        if row.groups is not None:
            told["groups"] = self._to_device(row.groups)
            told["group_max"] = int(np.diff(row.groups).max(initial=1))
        return told

    def _to_device(self, array: npt.NDArray[np.generic]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self._device.type == "cpu" else tensor.to(self._device, non_blocking=True)


def tails_of(plan: Plan) -> tuple[tuple[int, int, int], ...]:
    """Block, block, tokens: KV that is copied before the plan's step."""
    if not len(plan.tail_tokens):
        return ()
    return tuple(zip(plan.tail_sources.tolist(), plan.tail_blocks.tolist(), plan.tail_tokens.tolist(), strict=True))


def copy_tails(caches: list[Tensor], tails: tuple[tuple[int, int, int], ...]) -> None:
    """The KV of the first tokens of a block into another one, in every layer: a prompt's last block, copied on write.

    `caches`: a tensor per layer whose first axis is blocks and whose last but one is tokens (docs/kernels.md).
    """
    for source, block, tokens in tails:
        for cache in caches:
            cache[block].narrow(-2, 0, tokens).copy_(cache[source].narrow(-2, 0, tokens))


def begin(batch: Batch, caches: list[Tensor], last_token: Tensor) -> Tensor:
    """What a step does before its model runs, on the executor's thread -> its token ids, int64 [t].

    The KV of tails is copied. Tokens that only the device knows yet come from `last_token` int64 [slots], by slot.
    """
    copy_tails(caches, batch.tails)
    if batch.feedback_at is not None and batch.feedback_slots is not None:
        batch.token_ids[batch.feedback_at] = last_token[batch.feedback_slots]
    return batch.token_ids


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a step as kernels see them: [n] each."""

    slots: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]
    samples: npt.NDArray[np.uint8]
    feedback: npt.NDArray[np.uint8]
    decodes: int
    groups: npt.NDArray[np.int32] | None = None  # [g + 1] first row of each draft; None: there are none


def rows_of(plan: Plan) -> Rows:
    """The plan's rows; each token of one with a draft becomes a row of its own, of the same slot.

    A layer writes the KV of all tokens before any of them attends, and a row attends to what is before it, so a drafted
    token is computed by the same kernels in the same way as the row that the next step would have had for it: where the
    matrix products do not depend on the number of rows, its logits have the same bits.
    """
    decodes = int(plan.decodes)
    if not plan.drafted:
        return Rows(plan.slots, plan.starts, plan.lengths, plan.samples, plan.feedback, decodes)
    counts = np.ones(len(plan.slots), np.int32)
    counts[:decodes] = plan.lengths[:decodes]
    row_of = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(row_of), dtype=np.int32) - (np.cumsum(counts, dtype=np.int32) - counts)[row_of]
    tokens = int(counts[:decodes].sum())
    lengths = plan.lengths[row_of]
    lengths[:tokens] = 1
    starts = plan.starts[row_of] + within
    groups = np.zeros(decodes + 1, np.int32)
    np.cumsum(counts[:decodes], dtype=np.int32, out=groups[1:])
    return Rows(plan.slots[row_of], starts, lengths, plan.samples[row_of], plan.feedback[row_of], tokens, groups)


def shared(array: npt.NDArray[np.int32]) -> Tensor:
    """A tensor over the same memory. The scheduler's view is read-only for Python; nothing here writes it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.from_numpy(array)

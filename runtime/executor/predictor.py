"""Runs the prediction layer behind each step: its KV for what the step computed, and what may come next.

    predictor = Predictor(model, cache, block_table, block_tokens=64)
    predictor.width = 3; predictor.wanted = {7}        # engine's thread: tokens to propose, for these sequences
    work = predictor.prepare(plan, batch)              # with the plan
    proposals = predictor.run(work, hidden, …)         # executor's thread, once the step's tokens are sampled

A row computed the tokens [s, e), and x followed e - 1. Entry j of the layer's KV is made of what stands behind token
j - 1 and of token j (models/prediction.py), so the step has all of the entries s to e: those of a prompt's row are
written in one go, and entry e, whose token was sampled just now, is the one that is asked what comes behind it. The
answer is asked again, and so on. Which tokens of a draft came true is seen on the device: entry s + 1 + i of such a
row is made of the token that was sampled at its i-th place, whatever was drafted there, and the entry behind the last
one that came true is asked.

What is not in a block of the row's own is not written: where e begins a block, nothing is proposed, entry e is written
by the next step, and proposals end with the block. In return no block is touched that the step does not hold.
"""

from __future__ import annotations

import time
from collections.abc import Container
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokenrelay.kernels import ops
from tokenrelay.kernels.batch import AttentionBatch, SamplingBatch
from tokenrelay.libscheduler import Plan
from tokenrelay.runtime.executor.batch import Batch
from tokenrelay.runtime.models.decoder import Model
from tokenrelay.runtime.models.prediction import Pairs, Prediction

Int64s = npt.NDArray[np.int64]
NOTHING = -1  # in the place of a token that was not proposed


@dataclass(frozen=True, slots=True)
class Proposals:
    """What may come behind the tokens that a step sampled."""

    sequence_ids: list[int]  # [r]
    token_ids: Int64s  # [r, width], NOTHING behind the last one of each
    contexts: Int64s  # [r] tokens known
    run_us: int  # that it took; 0 with prompts in the step, where it says little


@dataclass(frozen=True, slots=True)
class _Asked:
    """The r rows that are asked; indices for a row of whose draft nothing came true."""

    sequence_ids: list[int]
    rows: Tensor  # int64 [r] among the plan's
    entries: Tensor  # int64 [r] the entry that is asked
    entries_last: Tensor  # int64 [r] the row's last entry: behind it there is none to ask
    positions: Tensor  # int64 [r] of that entry
    limits: Tensor  # int64 [r] where the row's blocks end
    sampled: Tensor  # int64 [r] among the step's sampled tokens
    slots: Tensor  # int32 [r] as the step's block table has them
    blocks: Tensor  # int64 [r, 2] the block of `positions`, and the row's last one
    context_max: int


@dataclass(frozen=True, slots=True)
class PredictionWork:
    """What one step does: n rows of the plan, m entries. Made when it is launched."""

    width: int
    decode_only: bool
    carries: bool  # an entry is made of what stood behind an earlier step's token
    in_order: bool  # entry i is made of the step's i-th hidden state
    admitted_slots: Tensor | None  # int64 [a]
    row_slots: Tensor  # int64 [n]
    hidden_at: Tensor  # int64 [m] among the step's hidden states, then the rows' carried ones
    token_at: Tensor  # int64 [m] among the step's tokens, then the sampled ones
    positions: Tensor  # int64 [m]
    cache_slots: Tensor  # int64 [m]
    last_at: Tensor  # int64 [n] the last token that stands, among the step's; the first one of a draft's row
    drafts: tuple[Tensor, Tensor, Tensor, Tensor] | None  # rows [q]; [q, w]: drafted, sampled there, is one
    asked: _Asked | None


class Predictor:
    """The prediction layer of one model, and for each slot what stands behind its last token."""

    def __init__(
        self, model: Model, cache: Tensor, block_table: npt.NDArray[np.int32], *, block_tokens: int, tokens_max: int
    ) -> None:
        """`cache`: of the layer. `tokens_max`: that are ever proposed for one row."""
        assert isinstance(model.prediction, Prediction)
        self.width = 0  # tokens to propose behind each row of the next step; set before its launch
        self.wanted: Container[int] = ()  # sequences that want proposals
        self.model, self.layer, self.cache, self.tokens_max = model, model.prediction, cache, tokens_max
        self._table = block_table
        self._shift = block_tokens.bit_length() - 1
        self._mask = block_tokens - 1
        self._device = cache.device
        slots, hidden = block_table.shape[0], model.architecture.hidden
        # [slots + 1, d], 0: not known; the last one is of rows that pad a recorded step
        self.carried = torch.zeros(slots + 1, hidden, dtype=model.config.dtype, device=self._device)

    # -- engine's thread ----------------------------------------------------------------------------------------------
    def prepare(self, plan: Plan, batch: Batch) -> PredictionWork:
        """The indices of `plan`'s entries. Reads the block table as it is now."""
        rows, decodes = len(plan.slots), int(plan.decodes)
        starts, lengths = plan.starts.astype(np.int64), plan.lengths.astype(np.int64)
        slots, samples, ends = plan.slots.astype(np.int64), plan.samples.astype(np.bool_), starts + lengths
        is_decode = np.arange(rows) < decodes
        first = np.cumsum(lengths) - lengths  # [n] of the step's tokens
        counts = np.where(is_decode, lengths, 1) * samples
        first_sampled = np.cumsum(counts) - counts
        tokens = int(lengths.sum())
        # A decode row's first entry was written when its token was sampled, unless it begins a block.
        begins = np.where(is_decode & (starts & self._mask != 0), starts + 1, starts)
        stops = ends + (samples & (ends & self._mask != 0))
        sizes = stops - begins
        before = np.cumsum(sizes) - sizes
        row = np.repeat(np.arange(rows), sizes)
        positions = np.arange(len(row), dtype=np.int64) - (before - begins)[row]
        within = positions - starts[row]
        hidden_at = np.where(within == 0, tokens + row, first[row] + within - 1)
        known = np.where(is_decode, 1, lengths)[row]  # tokens of the row that are inputs for sure
        token_at = np.where(within < known, first[row] + within, tokens + first_sampled[row] + within - known)
        blocks = self._table[slots[row], positions >> self._shift].astype(np.int64)
        return PredictionWork(
            width=min(self.width, self.tokens_max),
            decode_only=decodes == rows,
            carries=bool((within == 0).any()),
            in_order=len(hidden_at) == tokens and bool((hidden_at == np.arange(tokens)).all()),
            admitted_slots=self._tensor(plan.admitted_slots.astype(np.int64)) if len(plan.admitted_slots) else None,
            row_slots=self._tensor(slots),
            hidden_at=self._tensor(hidden_at),
            token_at=self._tensor(token_at),
            positions=self._tensor(positions),
            cache_slots=self._tensor((blocks << self._shift) | (positions & self._mask)),
            last_at=self._tensor(np.where(is_decode, first, first + lengths - 1)),
            drafts=self._drafts(lengths[:decodes], first, first_sampled) if plan.drafted else None,
            asked=self._asked(plan, batch, is_decode, before - begins, stops, first, first_sampled),
        )

    def _drafts(self, lengths: Int64s, first: Int64s, sampled: Int64s) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = np.flatnonzero(lengths > 1)
        widths = lengths[rows] - 1
        at = np.minimum(np.arange(int(widths.max()))[None, :], widths[:, None] - 1)  # [q, w]
        there = np.arange(at.shape[1])[None, :] < widths[:, None]
        drafted, given = first[rows, None] + 1 + at, sampled[rows, None] + at
        return self._tensor(rows), self._tensor(drafted), self._tensor(given), self._tensor(there)

    def _asked(
        self,
        plan: Plan,
        batch: Batch,
        is_decode: npt.NDArray[np.bool_],
        shift: Int64s,  # [n] the row's first entry less its position
        stops: Int64s,  # [n] where the row's entries end
        first: Int64s,
        first_sampled: Int64s,
    ) -> _Asked | None:
        ids = plan.sequence_ids.tolist()
        rows = np.array([i for i in np.flatnonzero(plan.samples).tolist() if ids[i] in self.wanted], np.int64)
        if self.width <= 0 or rows.size == 0:
            return None
        starts, ends = plan.starts.astype(np.int64), (plan.starts + plan.lengths).astype(np.int64)
        positions = np.where(is_decode, starts + 1, ends)[rows]
        last = (ends[rows] - 1) >> self._shift
        inside = np.minimum(positions >> self._shift, last)
        slots = plan.slots.astype(np.int64)[rows]
        drafted_rows = int(plan.lengths[: plan.decodes].sum())  # rows of the step that decode: one for each token
        table_rows = np.where(is_decode, first, drafted_rows + np.arange(len(is_decode)) - int(plan.decodes))[rows]
        limits = (last + 1) << self._shift
        return _Asked(
            sequence_ids=[ids[i] for i in rows.tolist()],
            rows=self._tensor(rows),
            entries=self._tensor(positions + shift[rows]),
            entries_last=self._tensor(stops[rows] - 1 + shift[rows]),
            positions=self._tensor(positions),
            limits=self._tensor(limits),
            sampled=self._tensor(first_sampled[rows]),
            slots=batch.attention.slots[self._tensor(table_rows)],
            blocks=self._tensor(self._table[slots[:, None], np.stack((inside, last), axis=1)].astype(np.int64)),
            context_max=int(limits.max()),
        )

    # -- executor's thread --------------------------------------------------------------------------------------------
    def hidden(self, batch: Batch, caches: list[Tensor]) -> Tensor:
        """The step's forward pass, up to what the head multiplies: [t, d]."""
        return self.model.hidden(batch.token_ids, batch.attention, caches)

    def logits(self, hidden: Tensor) -> Tensor:
        """[s, d] -> float32 [s, V]."""
        found: Tensor = self.model.head(hidden)
        return found

    def run(
        self, work: PredictionWork, batch: Batch, hidden: Tensor, sampled: Tensor, sampling: SamplingBatch
    ) -> Proposals | None:
        """Write the step's entries, and propose. hidden [t, d], sampled int64 [s], whose parameters are `sampling`."""
        began, token_ids = time.perf_counter_ns(), batch.token_ids
        if work.admitted_slots is not None:
            self.carried[work.admitted_slots] = 0.0
        source = torch.cat((hidden, self.carried[work.row_slots])) if work.carries else hidden
        accepted = self._accepted(work, token_ids, sampled)
        self.carried[work.row_slots] = hidden[work.last_at + accepted]
        said = torch.cat((token_ids, sampled))
        asked, kept, at = work.asked, None, work.positions.new_empty(0)
        if asked is not None:
            came = accepted[asked.rows]
            entries = asked.entries + came
            kept = (entries <= asked.entries_last).nonzero().flatten()
            at, positions = entries[kept], (asked.positions + came)[kept]
        pairs = Pairs(
            hidden=source if work.in_order else source[work.hidden_at],
            embedded=self.model.embed(said[work.token_at]),
            positions=work.positions,
            cache_slots=work.cache_slots,
            asked=at,
        )
        if asked is None or kept is None or not len(kept):
            self.layer.write(pairs, self.model.cos_sin, self.cache)
            return None
        y = self._predict(pairs, batch, asked, kept, positions)
        chosen = _rows_of(sampling, (asked.sampled + came)[kept])
        proposed = self._propose(work.width, y, batch, asked, kept, positions, chosen)
        run_us = (time.perf_counter_ns() - began) // 1000 if work.decode_only else 0
        ids = [asked.sequence_ids[i] for i in kept.tolist()]
        return Proposals(ids, proposed.cpu().numpy(), (positions + 1).cpu().numpy(), run_us)

    def _accepted(self, work: PredictionWork, token_ids: Tensor, sampled: Tensor) -> Tensor:
        """int64 [n]: drafted tokens of each row that came true."""
        accepted = torch.zeros_like(work.row_slots)
        if work.drafts is not None:
            rows, drafted, given, there = work.drafts
            true = (token_ids[drafted] == sampled[given]) & there
            accepted[rows] = true.long().cumprod(1).sum(1)
        return accepted

    def _predict(self, pairs: Pairs, batch: Batch, asked: _Asked, kept: Tensor, positions: Tensor) -> Tensor:
        """The layer's answer for the kept rows at `positions`: [r, d]."""
        rows = len(kept)
        attention = AttentionBatch(
            block_table=batch.attention.block_table,
            slots=asked.slots[kept],
            starts=positions.to(torch.int32),
            lengths=torch.ones(rows, dtype=torch.int32, device=self._device),
            offsets=torch.arange(rows + 1, dtype=torch.int32, device=self._device),
            positions=positions,
            cache_slots=pairs.cache_slots,
            decodes=rows,
            context_max=asked.context_max,
        )
        y: Tensor = self.layer(pairs, self.model.cos_sin, attention, self.cache)
        return y

    def _propose(
        self,
        width: int,
        y: Tensor,
        batch: Batch,
        asked: _Asked,
        kept: Tensor,
        positions: Tensor,
        sampling: SamplingBatch,
    ) -> Tensor:
        """Ask again and again: int64 [r, width]. A token is chosen as the model will choose it: from the layer's
        distribution by the random number of its place, so what is likely for both is often the same token."""
        proposed = torch.full((len(kept), width), NOTHING, dtype=torch.int64, device=self._device)
        alive = torch.arange(len(kept), device=self._device)
        for i in range(width):
            sampling = _moved(sampling)
            tokens = ops.sample(self.model.head(y), sampling)
            proposed[alive, i] = tokens
            positions = positions + 1
            inside = (positions < asked.limits[kept]).nonzero().flatten()
            if i + 1 == width or not len(inside):
                break
            kept, alive, positions = kept[inside], alive[inside], positions[inside]
            sampling = _rows_of(sampling, inside)
            blocks = asked.blocks[kept]
            second = positions >> self._shift != asked.positions[kept] >> self._shift
            block = torch.where(second, blocks[:, 1], blocks[:, 0])
            pairs = Pairs(
                hidden=y[inside],
                embedded=self.model.embed(tokens[inside]),
                positions=positions,
                cache_slots=(block << self._shift) | (positions & self._mask),
                asked=torch.arange(len(kept), device=self._device),
            )
            y = self._predict(pairs, batch, asked, kept, positions)
        return proposed

    def _tensor(self, array: npt.NDArray[np.generic]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self._device.type == "cpu" else tensor.to(self._device, non_blocking=True)


def _rows_of(sampling: SamplingBatch, rows: Tensor) -> SamplingBatch:
    """Those rows of it."""
    return SamplingBatch(
        temperature=sampling.temperature[rows],
        top_p=sampling.top_p[rows],
        top_k=sampling.top_k[rows],
        min_p=sampling.min_p[rows],
        seed=sampling.seed[rows],
        choice=sampling.choice[rows],
        position=sampling.position[rows],
    )


def _moved(sampling: SamplingBatch) -> SamplingBatch:
    """The same rows, one output position later."""
    s = sampling
    return SamplingBatch(s.temperature, s.top_p, s.top_k, s.min_p, s.seed, s.choice, s.position + 1)

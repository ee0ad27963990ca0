"""The prediction layer behind recorded steps: what predictor.py does with the host's help, in tensors of fixed sizes.

    recorded = RecordedPredictor(predictor, slots=64, block_tokens=64)
    recorded.fill(host, rows, plan)                          # engine's thread, with the step's other bytes
    recorded.after_step(asking, views, drafts, …)            # inside the step's recording
    recorded.ask(asking, views)                              # a recording of its own, replayed for each further token

A step of n rows has two entries of the layer's KV for each row: the one that its sampled token makes, and, where the
row's own token begins a block, that one (the step before could not write it). What must not be written has slot -1.
Which tokens of a draft came true decides on the device which row of a sequence is asked. Whoever is not asked, or
whose block ends, goes on as a row that reads one token and writes none: nobody waits for the device to count rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokenrelay.kernels import ops
from tokenrelay.kernels.batch import AttentionBatch, SamplingBatch
from tokenrelay.libscheduler import Plan
from tokenrelay.runtime.executor.batch import Rows
from tokenrelay.runtime.executor.predictor import NOTHING, Predictor, Proposals
from tokenrelay.runtime.models.prediction import Pairs

Host = Mapping[str, npt.NDArray[Any]]
OF_ROWS = ("entry_slots", "first_slots", "head")
OF_SEQUENCES = ("group_first", "group_slot", "wanted", "limits")
SETTINGS = ("temperature", "top_p", "top_k", "min_p", "seed", "choice")


@dataclass(slots=True, eq=False)
class Asking:
    """What a of the sequences of one recorded size are asked next. The device's."""

    hidden: Tensor  # [a, d] what stood behind the token before
    token: Tensor  # int64 [a] the token that is known, or was proposed last
    position: Tensor  # int64 [a] of that token; 0 where nobody is asked
    slot: Tensor  # int64 [a] of the cache, where its entry goes; -1: nowhere
    alive: Tensor  # bool [a]: it is asked
    place: Tensor  # int64 [a] of that token in the output
    out: Tensor  # int64 [a, 1 + tokens]: tokens known (0: not asked), and what was proposed, the newest last
    replay: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """One step's questions. Made when it is launched."""

    sequence_ids: list[int]  # [g] of all rows of the plan
    width: int  # tokens to propose; 0: none
    admitted: npt.NDArray[np.int64]  # slots of new sequences


class RecordedPredictor:
    """The fixed-size half of a predictor, for the recorded steps of one model."""

    def __init__(self, predictor: Predictor, block_table: npt.NDArray[np.int32], *, block_tokens: int) -> None:
        """`block_table` int32 [slots, blocks]: the scheduler's, shared."""
        self._predictor = predictor
        self._table = block_table
        self._slots = block_table.shape[0]
        self._shift = block_tokens.bit_length() - 1
        self._mask = block_tokens - 1
        self._positions_max: int = predictor.model.cos_sin.shape[0]

    def asked_of(self, rows: int) -> int:
        """Sequences of a step of so many rows, at most."""
        return min(rows, int(self._slots))

    # -- engine's thread ----------------------------------------------------------------------------------------------
    def sections(self, rows: int) -> dict[str, tuple[int, torch.dtype]]:
        """What a step of `rows` rows needs of the host, by name: elements and their type."""
        asked = self.asked_of(rows)
        counts = dict.fromkeys(OF_ROWS, rows) | dict.fromkeys(OF_SEQUENCES, asked)
        return {name: (count, torch.int64) for name, count in counts.items()}

    def pad(self, host: Host, rows: int, sequences: int) -> None:
        """From these on: entries that are written nowhere, sequences that are not asked."""
        for name in ("entry_slots", "first_slots"):
            host[name][rows:] = -1
        host["head"][rows:] = np.arange(rows, len(host["head"]))
        host["group_slot"][sequences:] = self._slots
        for name in ("group_first", "wanted", "limits"):
            host[name][sequences:] = 0

    def fill(self, host: Host, rows: Rows, plan: Plan) -> Asked:
        """The indices of the step's entries. Reads the block table as it is now."""
        count, slots, starts = rows.decodes, rows.slots.astype(np.int64), rows.starts.astype(np.int64)
        groups = np.arange(count + 1) if rows.groups is None else rows.groups.astype(np.int64)
        first, last = groups[:-1], groups[1:] - 1
        self.pad(host, count, len(first))
        # The token behind a row is in a block of the sequence's own, but for the last row's where that fills its block.
        after = starts + 1
        kept = after & self._mask != 0
        kept |= np.bincount(last, minlength=count) == 0
        at = np.where(kept, after, starts)
        host["entry_slots"][:count] = np.where(kept, self._slots_of(slots, at), -1)
        host["first_slots"][:count] = -1
        begins = first[starts[first] & self._mask == 0]
        host["first_slots"][begins] = self._slots_of(slots[begins], starts[begins])
        host["head"][:count] = np.repeat(first, np.diff(groups))
        ids, wanted = plan.sequence_ids.tolist(), self._predictor.wanted
        asked = len(first)
        host["group_first"][:asked] = first
        host["group_slot"][:asked] = slots[first]
        host["wanted"][:asked] = [sequence_id in wanted for sequence_id in ids]
        host["limits"][:asked] = np.minimum(((starts[last] >> self._shift) + 1) << self._shift, self._positions_max)
        width = min(self._predictor.width, self._predictor.tokens_max) if host["wanted"][:asked].any() else 0
        return Asked(ids, width, plan.admitted_slots.astype(np.int64))

    def _slots_of(self, slots: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        blocks = self._table[slots, positions >> self._shift].astype(np.int64)
        found: npt.NDArray[np.int64] = (blocks << self._shift) | (positions & self._mask)
        return found

    # -- executor's thread --------------------------------------------------------------------------------------------
    def asking(self, rows: int) -> Asking:
        """The memory of one recorded size."""
        predictor, count = self._predictor, self.asked_of(rows)
        device = predictor.carried.device
        numbers = (torch.zeros(count, dtype=torch.int64, device=device) for _ in range(4))
        token, position, slot, place = numbers
        return Asking(
            hidden=torch.zeros(count, predictor.carried.shape[1], dtype=predictor.carried.dtype, device=device),
            token=token,
            position=position,
            slot=slot.fill_(-1),
            alive=torch.zeros(count, dtype=torch.bool, device=device),
            place=place,
            out=torch.zeros(count, 1 + predictor.tokens_max, dtype=torch.int64, device=device),
        )

    def admit(self, asked: Asked) -> None:
        """Nothing is known before a new sequence's first token."""
        if len(asked.admitted):
            self._predictor.carried[torch.from_numpy(asked.admitted).to(self._predictor.carried.device)] = 0.0

    def after_step(
        self, asking: Asking, views: Mapping[str, Tensor], drafts: bool, token_ids: Tensor, hidden: Tensor, said: Tensor
    ) -> None:
        """Write the step's entries, put the questions. token_ids, said int64 [n] (what was sampled), hidden [n, d]."""
        predictor, positions = self._predictor, views["positions"]
        model, carried = predictor.model, predictor.carried
        entry_slots = views["entry_slots"]
        pairs = Pairs(
            hidden=torch.cat((hidden, carried[views["slot"]])),
            embedded=model.embed(torch.cat((said, token_ids))),
            positions=torch.cat((positions + 1, positions)).clamp_(max=self._positions_max - 1),
            cache_slots=torch.cat((entry_slots, views["first_slots"])),
            asked=positions[:0],
        )
        predictor.layer.write(pairs, model.cos_sin, predictor.cache)
        last = views["group_first"]
        if drafts:
            last = _last_true(views["head"], token_ids, said)[last]
        behind = hidden[last]  # [a, d]
        carried[views["group_slot"]] = behind
        slot = entry_slots[last]
        alive = (views["wanted"] > 0) & (slot >= 0)
        position = torch.where(alive, positions[last] + 1, 0)
        asking.hidden.copy_(behind)
        asking.token.copy_(said[last])
        asking.position.copy_(position)
        asking.slot.copy_(torch.where(alive, slot, -1))
        asking.alive.copy_(alive)
        asking.place.copy_(views["position"][last])
        asking.out.fill_(NOTHING)
        asking.out[:, 0].copy_(torch.where(alive, position + 1, 0))

    def ask(self, asking: Asking, views: Mapping[str, Tensor], rows: int) -> None:
        """Propose one token more for whoever is asked, chosen as the model will choose it: see `Predictor`."""
        predictor, count = self._predictor, asking.token.shape[0]
        model, first = predictor.model, views["group_first"]
        table = views["table"].view(rows, -1)
        device = first.device
        each = torch.arange(count + 1, dtype=torch.int32, device=device)
        attention = AttentionBatch(
            block_table=table,
            slots=first.to(torch.int32),
            starts=asking.position.to(torch.int32),
            lengths=torch.ones(count, dtype=torch.int32, device=device),
            offsets=each,
            positions=asking.position,
            cache_slots=asking.slot,
            decodes=count,
            context_max=table.shape[1] << self._shift,
        )
        embedded = model.embed(asking.token)
        pairs = Pairs(asking.hidden, embedded, asking.position, asking.slot, each[:-1].to(torch.int64))
        y = predictor.layer(pairs, model.cos_sin, attention, predictor.cache)
        asking.place.add_(1)
        settings = [*(views[name][first] for name in SETTINGS), asking.place]
        tokens = ops.sample(model.head(y), SamplingBatch(*settings))
        said = torch.where(asking.alive, tokens, NOTHING)
        asking.out[:, 1:].copy_(torch.cat((asking.out[:, 2:], said.unsqueeze(1)), dim=1))
        position = asking.position + 1
        alive = asking.alive & (position < views["limits"])
        position = torch.where(alive, position, 0)
        block = table[first, position >> self._shift].to(torch.int64)
        asking.slot.copy_(torch.where(alive, (block << self._shift) | (position & self._mask), -1))
        asking.hidden.copy_(y)
        asking.token.copy_(tokens)
        asking.position.copy_(position)
        asking.alive.copy_(alive)


def _last_true(head: Tensor, token_ids: Tensor, said: Tensor) -> Tensor:
    """Of each row the last one of its sequence that is reached from it by drafted tokens that came true: int64 [n].

    `head`: the first row of each row's sequence.
    """
    at = torch.arange(head.shape[0], device=head.device)
    goes_on = (head[1:] == head[:-1]) & (token_ids[1:] == said[:-1])
    stops = torch.cat((torch.where(goes_on, head.shape[0], at[:-1]), at[-1:]))
    return stops.flip(0).cummin(0).values.flip(0)


def proposals_of(asked: Asked, out: npt.NDArray[np.int64], run_us: int) -> Proposals | None:
    """What the host reads of `Asking.out` [g, 1 + tokens]; None: nobody was asked."""
    kept = np.flatnonzero(out[:, 0] > 0)
    if not len(kept):
        return None
    ids = [asked.sequence_ids[i] for i in kept.tolist()]
    return Proposals(ids, out[kept, -asked.width :].copy(), out[kept, 0].copy(), run_us)

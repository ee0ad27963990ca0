"""Per-slot sampling state, and the choice of the next tokens.

What a sequence asks is written once, when it takes a slot. A step gathers it by slot; steps of the same slots reuse the
gathered tensors. Penalties, bias, masks and log-probabilities cost only the rows that ask for them.
Random numbers are keyed by (seed, choice, output position): preemption and migration do not change them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokenrelay.kernels import ops
from tokenrelay.kernels.batch import SamplingBatch
from tokenrelay.kernels.step import SlotSettings
from tokenrelay.libscheduler import Plan
from tokenrelay.runtime.executor.grammars import GrammarAdmission, GrammarSource, GrammarState
from tokenrelay.runtime.executor.penalties import PenaltyAdmission, PenaltyState
from tokenrelay.runtime.requests import SamplingParams, TokenIds, TokenLogprobs

NOT_FINITE = "the model's logits are not finite: its weights or its numerics are broken for this input"

Int64s = npt.NDArray[np.int64]


@dataclass(slots=True)
class SampleWork:
    """What one step samples: made when it is launched, used when it runs."""

    batch: SamplingBatch
    admissions: list[PenaltyAdmission] = field(default_factory=list)
    penalty_rows: Int64s | None = None  # sampled rows that ask for penalties or biases
    penalty_slots: Int64s | None = None
    masks: tuple[Int64s, Int64s] | None = None  # row, token: not to be chosen
    grammar_admissions: list[GrammarAdmission] = field(default_factory=list)
    grammar_rows: Int64s | None = None  # sampled rows whose output must be something
    grammar_slots: Int64s | None = None
    grammar_drafts: dict[int, list[int]] = field(default_factory=dict)  # slot -> its drafted tokens in this step
    failures: dict[int, str] = field(default_factory=dict)  # row -> why its sequence cannot go on; set by `run`
    logprob_rows: Int64s | None = None
    logprob_counts: Int64s | None = None  # how many most likely ones each of those rows wants
    gathered: bool = True  # else `batch` is empty: nothing special is asked, and the caller has the settings (`fill`)

    @property
    def special(self) -> bool:
        """Whether a row asks for more than a token."""
        asked = (self.penalty_rows, self.masks, self.grammar_rows, self.logprob_rows)
        return any(part is not None for part in asked)


class Sampler:
    """The state of `slots` slots. `prepare` belongs to the engine's thread, `run` to the executor's."""

    def __init__(
        self, slots: int, vocab_size: int, device: torch.device, grammars: GrammarSource | None = None
    ) -> None:
        self._device = device
        self._vocab_size = vocab_size
        self._params: list[SamplingParams | None] = [None] * slots
        self._temperature = np.zeros(slots, np.float32)
        self._top_p = np.ones(slots, np.float32)
        self._top_k = np.zeros(slots, np.int32)
        self._min_p = np.zeros(slots, np.float32)
        self._seed = np.zeros(slots, np.int64)
        self._choice = np.zeros(slots, np.int32)
        self._output_start = np.zeros(slots, np.int64)
        self._special = np.zeros(slots, np.bool_)  # asks for penalties, bias, masks or log-probabilities
        self._penalties = PenaltyState(device)
        self._grammars = GrammarState(grammars) if grammars is not None else None
        self._last_slots: Int64s | None = None  # the slots of the last step, whose gathered tensors are below
        self._last_batch: SamplingBatch | None = None
        self._no_settings = SamplingBatch(*(torch.empty(0) for _ in range(7)))

    # -- engine's thread ----------------------------------------------------------------------------------------------
    def prepare(
        self,
        plan: Plan,
        slots: Int64s,
        ends: Int64s,
        requests: Mapping[int, SamplingParams],
        token_ids_of: Callable[[int], TokenIds | None],
        *,
        captured: bool = False,
    ) -> SampleWork:
        """Take over the sequences that the plan admits, and gather what the sampled rows ask.

        `slots`, `ends`: [s] of the sampled rows; `ends` counts the tokens before the one to sample. `captured`: rows
        that ask for nothing but a token need no tensors, the caller takes their settings by `fill`.
        """
        work = self.admitted(plan, requests, token_ids_of)
        special = bool(self._special[slots].any())
        positions = ends - self._output_start[slots]
        if special or not captured:
            work.batch, work.gathered = self._gather(slots, positions), True
        if special:
            self.ask(work, plan, slots, positions)
        return work

    def admitted(
        self,
        plan: Plan,
        requests: Mapping[int, SamplingParams],
        token_ids_of: Callable[[int], TokenIds | None],
    ) -> SampleWork:
        """The first part of `prepare`: take over the sequences that the plan admits; nothing is gathered."""
        work = SampleWork(self._no_settings, gathered=False)
        if len(plan.admitted_ids):
            self._admit(plan, requests, token_ids_of, work.admissions, work.grammar_admissions)
        return work

    def ask(self, work: SampleWork, plan: Plan, slots: Int64s, positions: Int64s) -> None:
        """The last part of `prepare`, where a sampled row asks for more than a token. `positions`: in the output."""
        self._prepare_special(work, slots, positions)
        if plan.drafted and work.grammar_rows is not None:
            _note_drafts(work, plan)

    @property
    def settings(self) -> SlotSettings:
        """Of all slots, as they are; the arrays are the same for ever."""
        return SlotSettings(
            temperature=self._temperature,
            top_p=self._top_p,
            min_p=self._min_p,
            top_k=self._top_k,
            choice=self._choice,
            seed=self._seed,
            output_start=self._output_start,
            special=self._special,
        )

    def fill(self, into: Mapping[str, npt.NDArray[Any]], slots: Int64s, ends: Int64s) -> None:
        """The settings of `slots` [s] into the first s elements of arrays named as `SamplingBatch`'s fields are."""
        rows = len(slots)
        for name in ("temperature", "top_p", "top_k", "min_p", "seed", "choice"):
            into[name][:rows] = getattr(self, f"_{name}")[slots]
        into["position"][:rows] = ends - self._output_start[slots]

    def _admit(
        self,
        plan: Plan,
        requests: Mapping[int, SamplingParams],
        token_ids_of: Callable[[int], TokenIds | None],
        admissions: list[PenaltyAdmission],
        grammars: list[GrammarAdmission],
    ) -> None:
        ids, slots, output_starts = plan.admitted_ids, plan.admitted_slots, plan.admitted_output_start
        for sequence_id, slot, output_start in zip(ids.tolist(), slots.tolist(), output_starts.tolist(), strict=True):
            params = requests[sequence_id]
            self._params[slot] = params
            self._temperature[slot] = params.temperature
            self._top_p[slot] = params.top_p
            self._top_k[slot] = params.top_k
            self._min_p[slot] = params.min_p
            self._seed[slot] = params.seed - (1 << 64) if params.seed >> 63 else params.seed
            self._choice[slot] = params.choice
            self._output_start[slot] = output_start
            self._special[slot] = bool(
                params.penalized
                or params.logit_bias
                or params.logprobs
                or params.grammar
                or (params.tokens_min and params.end_token_ids)
            )
            if params.penalized or params.logit_bias or params.grammar:
                token_ids = token_ids_of(sequence_id)
                assert token_ids is not None, f"sequence {sequence_id} was admitted and is unknown"
                if params.penalized or params.logit_bias:
                    admissions.append(PenaltyAdmission(slot, params, np.array(token_ids, np.int64), output_start))
                if params.grammar and self._grammars is not None:
                    output = tuple(token_ids[output_start:].tolist())
                    grammars.append(GrammarAdmission(slot, params.grammar, output))
        self._last_slots = None

    def _gather(self, slots: Int64s, positions: Int64s) -> SamplingBatch:
        last, previous = self._last_batch, self._last_slots
        position = self._to_device(positions)
        if last is not None and previous is not None and np.array_equal(slots, previous):
            return SamplingBatch(last.temperature, last.top_p, last.top_k, last.min_p, last.seed, last.choice, position)
        self._last_slots = slots
        self._last_batch = SamplingBatch(
            temperature=self._to_device(self._temperature[slots]),
            top_p=self._to_device(self._top_p[slots]),
            top_k=self._to_device(self._top_k[slots]),
            min_p=self._to_device(self._min_p[slots]),
            seed=self._to_device(self._seed[slots]),
            choice=self._to_device(self._choice[slots]),
            position=position,
        )
        return self._last_batch

    def _prepare_special(self, work: SampleWork, slots: Int64s, positions: Int64s) -> None:
        """Per-row work, only for the rows that ask."""
        penalized: list[int] = []
        masks: list[tuple[int, int]] = []
        logprobs: list[tuple[int, int]] = []
        grammars: list[int] = []
        for row in np.flatnonzero(self._special[slots]).tolist():
            params = self._params[slots[row]]
            assert params is not None
            if params.penalized or params.logit_bias:
                penalized.append(row)
            if positions[row] < params.tokens_min:
                masks += [(row, token) for token in params.end_token_ids if token < self._vocab_size]
            if params.logprobs:
                logprobs.append((row, params.logprobs - 1))
            if params.grammar:
                grammars.append(row)
        if penalized:
            work.penalty_rows = np.array(penalized, np.int64)
            work.penalty_slots = slots[work.penalty_rows]
        if grammars and self._grammars is not None:
            work.grammar_rows = np.array(grammars, np.int64)
            work.grammar_slots = slots[work.grammar_rows]
        if masks:
            rows, tokens = zip(*masks, strict=True)
            work.masks = (np.array(rows, np.int64), np.array(tokens, np.int64))
        if logprobs:
            rows, counts = zip(*logprobs, strict=True)
            work.logprob_rows, work.logprob_counts = np.array(rows, np.int64), np.array(counts, np.int64)

    # -- executor's thread --------------------------------------------------------------------------------------------
    def admit(self, work: SampleWork) -> None:
        """Take over what the step's plan admitted, before anything else of the step."""
        for admission in work.admissions:
            self._penalties.admit(admission)
        for grammar in work.grammar_admissions:
            assert self._grammars is not None, "grammars are admitted where they can be read"
            self._grammars.admit(grammar)
        for slot, drafted in work.grammar_drafts.items():
            assert self._grammars is not None, "grammars are admitted where they can be read"
            self._grammars.expect(slot, drafted)

    def run(self, work: SampleWork, logits: Tensor) -> tuple[Tensor, dict[int, TokenLogprobs] | None]:
        """Sample from `logits` f32 [s, V] (which it may change). Tokens int64 [s], and log-probabilities by row."""
        work.failures = self._broken(logits)
        raw = None
        if work.logprob_rows is not None:
            raw = logits[self._to_device(work.logprob_rows)]  # indexing copies: what follows does not change it
        if work.penalty_rows is not None and work.penalty_slots is not None:
            ops.apply_penalties(logits, self._penalties.batch(work.penalty_rows, work.penalty_slots))
        if work.masks is not None:
            rows, tokens = work.masks
            logits[self._to_device(rows), self._to_device(tokens)] = float("-inf")
        token_ids = self._choose(work, logits)
        if work.penalty_rows is not None and work.penalty_slots is not None:
            self._penalties.count(work.penalty_slots, token_ids[self._to_device(work.penalty_rows)])
        return token_ids, None if raw is None else self._logprobs(work, raw, token_ids)

    def _broken(self, logits: Tensor) -> dict[int, str]:
        """Rows whose logits are no numbers: what is sampled from them means nothing, so zeros take their place."""
        finite = ops.finite_rows(logits)
        if bool(finite.all()):
            return {}
        logits[~finite] = 0.0
        return dict.fromkeys(torch.nonzero(~finite).flatten().tolist(), NOT_FINITE)

    def _choose(self, work: SampleWork, logits: Tensor) -> Tensor:
        """Sample, rows with a grammar only what it allows."""
        rows, slots = work.grammar_rows, work.grammar_slots
        if self._grammars is None or rows is None or slots is None:
            return ops.sample(logits, work.batch)
        work.failures |= self._grammars.apply(logits, rows, slots)
        token_ids = ops.sample(logits, work.batch)
        self._grammars.advance(rows, slots, token_ids)
        return token_ids

    def close(self) -> None:
        """End the threads."""
        if self._grammars is not None:
            self._grammars.close()

    def _logprobs(self, work: SampleWork, raw: Tensor, token_ids: Tensor) -> dict[int, TokenLogprobs]:
        assert work.logprob_rows is not None and work.logprob_counts is not None
        top_k = min(int(work.logprob_counts.max()), self._vocab_size)
        chosen = token_ids[self._to_device(work.logprob_rows)]
        logprob, top_ids, top_logprobs = ops.token_logprobs(raw, chosen, top_k)
        rows = zip(
            work.logprob_rows.tolist(),
            work.logprob_counts.tolist(),
            logprob.tolist(),
            top_ids.tolist(),
            top_logprobs.tolist(),
            strict=True,
        )
        return {row: TokenLogprobs(value, ids[:count], values[:count]) for row, count, value, ids, values in rows}

    def _to_device(self, array: npt.NDArray[np.generic]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self._device.type == "cpu" else tensor.to(self._device, non_blocking=True)


def _note_drafts(work: SampleWork, plan: Plan) -> None:
    """Which tokens were drafted for slots with a grammar. A row that decodes is one token, and samples one (`rows_of`),
    so those of a draft are the rows of the same slot that follow each other.
    """
    assert work.grammar_rows is not None and work.grammar_slots is not None
    last = -1
    for row, slot in zip(work.grammar_rows.tolist(), work.grammar_slots.tolist(), strict=True):
        if slot == last:
            work.grammar_drafts.setdefault(slot, []).append(int(plan.token_ids[row]))
        last = slot

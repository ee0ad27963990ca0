"""Drafts from a model's prediction layer (models/prediction.py): what it proposes behind each step's tokens.

    drafter = PredictedDrafter(scheduler, predictor, tokens_max=3)      # as a Drafter (runtime/drafts.py)

The layer runs in the executor, behind the step whose tokens it goes on from, so how many tokens it shall propose is
said before: as many as pay, by what they cost (rows of the next step, and the layer's own time) and by how often the
first, second … one came true. Where none pays, none is asked for, but for a probe now and then: it shows what rows
cost as well, which a cost model that saw one row at a time cannot tell from what a step costs.

What was measured beats what is modelled: steps with drafts and steps without, of as many sequences, are timed from
commit to commit, and drafting begins or ends by the tokens per second that they gave. So there are short rests from
drafting as there are probes of it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from statistics import mean, median

import numpy as np

from tokenrelay.libscheduler import DraftAnswer, Outcome, Plan, Scheduler
from tokenrelay.runtime.drafts import (
    GAIN_MIN,
    PRIOR_TOKENS,
    PROBE_WIDTH,
    STEP_DRAFTS_MAX,
    Drafter,
    Rate,
    Text,
)
from tokenrelay.runtime.executor.predictor import NOTHING, Predictor, Proposals
from tokenrelay.runtime.requests import EngineRequest

# Of the first token, and of each further one when those before it came true: DeepSeek-V3's report has 0.85 to 0.9 for
# the first one (arXiv:2412.19437, section 5.4.3); the layer was not trained to go on from its own output.
FIRST_CHANCES = (0.8, 0.6, 0.5)
PROBE_STEPS = 8  # that a probe lasts
PROBE_EVERY = 128  # steps without a proposal, after which some are asked for all the same; and of drafting to a rest
TIMES_KEPT = 15  # of the layer's latest times: their median counts, since one in ten is a busy neighbour's
MEASURED_MIN = 6  # steps of each kind before they are compared
LOOKED_AT = 8  # sequences that say how many tokens shall be proposed


@dataclass(slots=True)
class Pace:
    """Tokens per second of steps of so many sequences, with drafts and without."""

    rows: int = 0
    last_s: float = 0.0  # when the step before it was committed; 0: it says nothing
    with_drafts: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=TIMES_KEPT))  # seconds, tokens
    without: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=TIMES_KEPT))

    def saw(self, rows: int, tokens: int, drafted: bool | None) -> None:
        """A step was committed. `drafted` None: one of neither kind, with prompts or with proposals for nothing."""
        now_s, last_s = time.monotonic(), self.last_s
        self.last_s = 0.0 if drafted is None else now_s
        if drafted is None:
            return
        if rows != self.rows:
            self.rows = rows
            self.with_drafts.clear()
            self.without.clear()
        elif last_s:
            (self.with_drafts if drafted else self.without).append((now_s - last_s, tokens))

    def pays(self) -> bool | None:
        """Whether drafts gave more tokens per second; None: too few steps were seen to say so."""
        if min(len(self.with_drafts), len(self.without)) < MEASURED_MIN:
            return None
        return self._per_s(self.with_drafts) > GAIN_MIN * self._per_s(self.without)

    @staticmethod
    def _per_s(steps: deque[tuple[float, int]]) -> float:
        """Median times, since a neighbour may stop a step; mean tokens, since that is what a draft is about."""
        return mean(tokens for _, tokens in steps) / max(1e-9, median(seconds for seconds, _ in steps))


class PredictedDrafter(Drafter):
    """Of one engine whose executor has a predictor."""

    _proposer = "mtp"

    def __init__(self, scheduler: Scheduler, predictor: Predictor, *, tokens_max: int) -> None:
        """`tokens_max`: of one draft, at most; 0: nobody drafts, and the layer only writes its KV."""
        super().__init__(scheduler, tokens_max=tokens_max)
        self._predictor = predictor
        self._proposed: dict[int, list[int]] = {}  # by sequence, from the step that was committed last
        self._context = 1  # tokens of a sequence, lately
        self._times: deque[float] = deque(maxlen=TIMES_KEPT)  # us that the layer took for one more token of all rows
        self._quiet = PROBE_EVERY  # steps since it was asked; nothing is known yet
        self._probes = 0  # steps that the present probe still lasts
        self._busy = 0  # steps since there was one without drafts
        self._rests = 0  # steps that the present rest still lasts
        self._pace = Pace()
        predictor.wanted = self._texts

    def opened(self, request: EngineRequest) -> None:
        """See `Drafter.opened`."""
        super().opened(request)
        if len(self._texts) == 1:
            self._ask([None])

    def _no_rates(self) -> tuple[Rate, ...]:
        """One for each place in a draft."""
        return tuple(Rate() for _ in range(self._tokens_max))

    def ended(self, sequence_id: int) -> None:
        """See `Drafter.ended`."""
        super().ended(sequence_id)
        self._proposed.pop(sequence_id, None)

    def committed(self, plan: Plan, outcome: Outcome, proposals: Proposals | None = None) -> None:
        """See `Drafter.committed`."""
        super().committed(plan, outcome)
        for text in self._touched.values():
            text.fresh.clear()  # what an index would read
        if not self._texts:
            return
        self._time(plan, outcome, proposals)
        if proposals is None:
            return
        for sequence_id, row in zip(proposals.sequence_ids, proposals.token_ids.tolist(), strict=True):
            if sequence_id in self._texts:
                self._proposed[sequence_id] = row[: row.index(NOTHING)] if NOTHING in row else row
        self._probes = max(0, self._probes - 1)
        self._context = int(proposals.contexts.mean())
        if proposals.run_us:
            self._times.append(proposals.run_us / proposals.token_ids.shape[1])

    def propose(self) -> None:
        """Offer what was proposed, as far as it pays, and say how much the next steps shall propose."""
        touched, self._touched = self._touched, {}
        proposed, self._proposed = self._proposed, {}
        offered, won, pays = 0, 0.0, self._pace.pays()
        for sequence_id, tokens in proposed.items():
            text = self._texts[sequence_id]
            if text.drafted and text.guess:
                continue  # steps that were launched before it have still to say what becomes of the older one
            text.guess, text.kind, text.drafted = tokens, 0, False
            if offered >= STEP_DRAFTS_MAX:
                continue
            width, gain = self._best_width(self._chances(text), offered, won, self._context)
            if self._rests or (pays is False and not self._probes):
                width = 0
            elif pays or self._probes:
                width = width or (PROBE_WIDTH if self._probes else 1)
            draft = tokens[:width]
            if draft and self._scheduler.draft(sequence_id, np.array(draft, np.uint32)) == DraftAnswer.DRAFTED:
                text.guess, text.drafted = draft, True
                offered += len(draft)
                won += gain
        if touched:
            self._ask(list(islice(touched.values(), LOOKED_AT)))

    def _ask(self, texts: Sequence[Text | None]) -> None:
        """How many tokens the steps that are launched next shall propose for each row: what pays for one of `texts`,
        the layer's time counted in. (What was proposed already is drafted where its rows pay.)"""
        if not self._tokens_max:
            return
        guessing_us = median(self._times) if self._times else 0.0
        width = max(self._best_width(self._chances(text), 0, 0.0, self._context, guessing_us)[0] for text in texts)
        if (pays := self._pace.pays()) is not None:
            width = max(width, 1) if pays else 0
        if self._rests:
            width = 0
        elif width == 0 and self._quiet >= PROBE_EVERY:
            self._probes = PROBE_STEPS
        if width or self._probes:
            self._quiet = 0
        self._predictor.width = width or (min(PROBE_WIDTH, self._tokens_max) if self._probes else 0)

    def _time(self, plan: Plan, outcome: Outcome, proposals: Proposals | None) -> None:
        """Count a step for the pace, for probes and for rests."""
        drafted = True if plan.drafted else None if proposals is not None else False
        decode_only = plan.decodes == len(plan.sequence_ids)
        self._pace.saw(plan.decodes, len(outcome.token_ids), drafted if decode_only else None)
        self._quiet += 1
        self._busy = self._busy + 1 if plan.drafted else 0
        self._rests = PROBE_STEPS if self._busy >= PROBE_EVERY else max(0, self._rests - 1)
        if self._rests:
            self._busy = 0

    def _chances(self, text: Text | None) -> list[float]:
        """Of each place to come true when those before it did; of all sequences, or of this one."""
        chances = []
        for i, rate in enumerate(self._rates):
            chance = rate.mean(FIRST_CHANCES[min(i, len(FIRST_CHANCES) - 1)], PRIOR_TOKENS)
            chances.append(chance if text is None else text.rates[i].mean(chance, PRIOR_TOKENS))
        return chances

    def _learn(self, text: Text, hits: int, *, missed: bool) -> None:
        for rates in (text.rates, self._rates):
            for i in range(text.kind, text.kind + hits):
                rates[i].saw(1, missed=False)
            if missed:
                rates[text.kind + hits].saw(0, missed=True)
        text.kind += hits

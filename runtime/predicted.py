"""Drafts from a model's prediction layer (models/prediction.py): what it proposes behind each step's tokens.

    drafter = PredictedDrafter(scheduler, predictor, tokens_max=3)      # as a Drafter (runtime/drafts.py)

The layer runs in the executor, behind the step whose tokens it goes on from, so how many tokens it shall propose is
said before: as many as pay, by what they cost (rows of the next step, and the layer's own time) and by how often the
first, second … one came true. Where none pays, none is asked for, but for a probe now and then: it shows what rows
cost as well, which a cost model that saw one row at a time cannot tell from what a step costs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import islice
from statistics import median

import numpy as np

from tokenrelay.libscheduler import DraftAnswer, Outcome, Plan, Scheduler
from tokenrelay.runtime.drafts import (
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
PROBE_EVERY = 256  # tokens without a proposal, after which some are asked for all the same
TIMES_KEPT = 15  # of the layer's latest times: their median counts, since one in ten is a busy neighbour's
LOOKED_AT = 8  # sequences that say how many tokens shall be proposed


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
        self._quiet = PROBE_EVERY  # tokens since it was asked; nothing is known yet
        self._probes = 0  # steps that the present probe still lasts
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
        self._quiet += len(outcome.token_ids)
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
        offered, won = 0, 0.0
        for sequence_id, tokens in proposed.items():
            text = self._texts[sequence_id]
            if text.drafted and text.guess:
                continue  # steps that were launched before it have still to say what becomes of the older one
            text.guess, text.kind, text.drafted = tokens, 0, False
            if offered >= STEP_DRAFTS_MAX:
                continue
            width, gain = self._best_width(self._chances(text), offered, won, self._context)
            draft = tokens[: width or (PROBE_WIDTH if self._probes else 0)]
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
        if width == 0 and self._quiet >= PROBE_EVERY:
            self._probes = PROBE_STEPS
        if width or self._probes:
            self._quiet = 0
        self._predictor.width = width or (min(PROBE_WIDTH, self._tokens_max) if self._probes else 0)

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

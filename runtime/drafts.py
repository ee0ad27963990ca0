"""Drafts from a sequence's own text: what followed its last tokens where they stood before.

    drafter = Drafter(scheduler, tokens_max=8)
    drafter.opened(request)                        # may it draft at all?
    drafter.committed(plan, outcome)               # its new tokens, and what became of its draft
    drafter.propose()                              # before the next plan
    drafter.ended(sequence_id)

A draft pays where the device waits for its weights: some more rows cost little there, and each token that comes true
saves a step. So the width is chosen by what the cost model says of more rows, and by how often drafts came true for
this sequence when as many tokens before them were the same; where it does not pay, none is proposed but for a probe now
and then. What comes out is the same in any case (docs/scheduler.md, "Drafts").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tokenrelay.libscheduler import DRAFT_TOKENS_MAX, DraftAnswer, Handover, NgramIndex, Outcome, Plan, Scheduler
from tokenrelay.runtime.executor.predictor import Proposals
from tokenrelay.runtime.requests import EngineRequest, SamplingParams, TokenIds

ORDER = 3  # tokens that must be the same; fewer say little, more find little
TEXT_MAX = 1 << 17  # tokens of a sequence that are remembered
INDEXED_MAX = 1 << 14  # tokens of a prompt that are indexed in one turn of the loop: less than half a millisecond
STEP_DRAFTS_MAX = 64  # drafted tokens in one step
PROBE_TOKENS = 64  # tokens of a sequence without a draft, after which a short one is tried all the same
PROBE_WIDTH = 2
REFRESH_STEPS = 32  # steps after which the cost model is asked anew
AHEAD_US = 150.0  # that a step waits for the plan which is otherwise made while the one before it runs
GAIN_MIN = 1.02  # tokens per second that a draft must win, by what is known
UNKNOWN_COST = 0.15  # of one more row, as a part of a step, before steps were measured
MATCHES = (4, 8, 16)  # bounds of the classes by tokens in common
FIRST_RATES = (0.5, 0.6, 0.7, 0.8)  # of tokens that come true, by class, before any were seen
FORGETS = 1 - 1 / 64  # each token counts so much less at the next one
PRIOR_TOKENS = 4.0  # what all sequences showed weighs as much as so many tokens of this one


@dataclass(slots=True)
class Rate:
    """How many of the drafted tokens came true, the latest ones first."""

    hits: float = 0.0
    trials: float = 0.0

    def saw(self, hits: int, missed: bool) -> None:
        """So many came true in a row, then one did not, or the draft was at its end."""
        trials = hits + missed
        fade = FORGETS**trials
        self.hits, self.trials = self.hits * fade + hits, self.trials * fade + trials

    def mean(self, prior: float, weight: float) -> float:
        """The share that came true, `prior` counting as much as `weight` tokens."""
        return (self.hits + prior * weight) / (self.trials + weight)


@dataclass(slots=True)
class Text:
    """One sequence that may draft."""

    index: NgramIndex | None = None  # from its first token on
    rest: TokenIds | None = None  # of its prompt, not yet in the index
    fresh: list[int] = field(default_factory=list)  # tokens that are not yet in the index
    rates: tuple[Rate, ...] = ()
    guess: list[int] = field(default_factory=list)  # the draft that the scheduler has, as far as it is open
    kind: int = 0  # class of that draft; with a prediction layer, tokens of it that came true already
    idle: int = 0  # tokens since the last draft
    drafted: bool = False  # with a prediction layer: the scheduler has `guess`; else it is only held against what comes


class Drafter:
    """Of one engine; belongs to its thread. O(new tokens) for each step, whatever the length of the texts."""

    _proposer = "ngram"

    def __init__(self, scheduler: Scheduler, *, tokens_max: int) -> None:
        """`tokens_max`: of one draft, at most; 0: nobody drafts."""
        self._scheduler = scheduler
        self._tokens_max = min(tokens_max, DRAFT_TOKENS_MAX)
        self._texts: dict[int, Text] = {}
        self._touched: dict[int, Text] = {}  # that got tokens since the last proposal
        self._rates = self._no_rates()
        self._costs: list[float] = []  # of a step, by drafted tokens in it; a step without them costs 1
        self._alone_us = 0.0  # that such a step takes; 0: not known
        self._rows = 0  # that decode in a step, lately
        self._steps_left = 0  # until the costs are looked up again

    @property
    def proposer(self) -> str:
        """Where drafts come from, for metrics; empty: nobody drafts."""
        return self._proposer if self._tokens_max else ""

    def opened(self, request: EngineRequest) -> None:
        """A sequence was accepted."""
        if self._tokens_max and may_draft(request.sampling) and request.handover != Handover.SOURCE:
            self._texts[request.sequence_id] = Text(rates=self._no_rates())

    def ended(self, sequence_id: int) -> None:
        """It will not go on."""
        self._texts.pop(sequence_id, None)
        self._touched.pop(sequence_id, None)

    def _no_rates(self) -> tuple[Rate, ...]:
        """One for each class of tokens in common."""
        return tuple(Rate() for _ in FIRST_RATES)

    def committed(self, plan: Plan, outcome: Outcome, proposals: Proposals | None = None) -> None:
        """Tokens came; those of a draft are held against it. `proposals`: of a prediction layer, which is not asked."""
        if not self._texts:
            return
        self._steps_left -= 1
        if plan.decodes and plan.decodes != self._rows:
            self._rows, self._steps_left = plan.decodes, 0
        drafted = {}
        if plan.drafted:
            lengths = plan.lengths[: plan.decodes]
            drafted = {int(plan.sequence_ids[row]): int(lengths[row]) - 1 for row in np.flatnonzero(lengths > 1)}
        given: dict[int, list[int]] = {}
        for sequence_id, token_id in zip(outcome.sequence_ids.tolist(), outcome.token_ids.tolist(), strict=True):
            given.setdefault(sequence_id, []).append(token_id)
        for sequence_id, token_ids in given.items():
            text = self._texts.get(sequence_id)
            if text is None:
                continue
            text.fresh += token_ids
            text.idle += len(token_ids)
            self._touched[sequence_id] = text
            if (width := drafted.get(sequence_id, 0)) > 0:
                self._learn(text, len(token_ids) - 1, missed=len(token_ids) <= width)
                text.guess = []
            elif text.guess:  # a step that was launched before it
                self._follow(text, token_ids)

    def propose(self) -> None:
        """Offer drafts for the sequences that got tokens, as far as they pay."""
        if not self._touched:
            return
        touched, self._touched = self._touched, {}
        offered, won = 0, 0.0
        for sequence_id, text in touched.items():
            index = self._indexed(sequence_id, text)
            if index is None or text.guess or offered >= STEP_DRAFTS_MAX:
                continue
            draft, matched = index.find(self._tokens_max)
            if not matched:
                continue
            kind = next((i for i, bound in enumerate(MATCHES) if matched <= bound), len(MATCHES))
            rate = text.rates[kind].mean(self._rates[kind].mean(FIRST_RATES[kind], PRIOR_TOKENS), PRIOR_TOKENS)
            width, gain = self._width(rate, offered, won, len(index))
            if width == 0 and text.idle >= PROBE_TOKENS:
                width = PROBE_WIDTH
            if width == 0:
                continue
            draft = draft[:width]
            if self._scheduler.draft(sequence_id, draft) == DraftAnswer.DRAFTED:
                text.guess, text.kind, text.idle = draft.tolist(), kind, 0
                offered += len(draft)
                won += gain

    def _indexed(self, sequence_id: int, text: Text) -> NgramIndex | None:
        """Its index with all its tokens; None while a long prompt is not in it yet."""
        if text.index is None:
            text.index = NgramIndex(order=ORDER, tokens_max=TEXT_MAX)
            text.rest = self._scheduler.token_ids(sequence_id)
            text.fresh.clear()  # they are there
        if text.rest is not None:
            text.index.extend(text.rest[:INDEXED_MAX])
            text.rest = text.rest[INDEXED_MAX:] if len(text.rest) > INDEXED_MAX else None
        if text.rest is not None:
            return None
        if len(text.fresh) == 1:
            text.index.append(text.fresh[0])
        elif text.fresh:
            text.index.extend(np.array(text.fresh, np.uint32))
        text.fresh.clear()
        return text.index

    def _follow(self, text: Text, token_ids: Sequence[int]) -> None:
        """The scheduler does the same: it takes what came true off the draft, or drops it."""
        for token_id in token_ids:
            if text.guess and text.guess[0] == token_id:
                self._learn(text, 1, missed=False)
                text.guess.pop(0)
            elif text.guess:
                self._learn(text, 0, missed=True)
                text.guess = []

    def _learn(self, text: Text, hits: int, *, missed: bool) -> None:
        text.rates[text.kind].saw(hits, missed)
        self._rates[text.kind].saw(hits, missed)

    def _width(self, rate: float, offered: int, won: float, context: int) -> tuple[int, float]:
        """The width that gives the most tokens per second, 0 when none gives more than none does; tokens that it wins.

        `offered`, `won`: drafted tokens that the step has already, and what they will win. `context`: of a row.
        """
        return self._best_width([rate] * self._tokens_max, offered, won, context)

    def _best_width(
        self, rates: Sequence[float], offered: int, won: float, context: int, guessing_us: float = 0.0
    ) -> tuple[int, float]:
        """As `_width`; `rates`: how often the i-th token comes true when those before it did.

        `guessing_us`: what each token takes to guess, where that is still to be decided.
        """
        if self._steps_left <= 0:
            self._look_up(context)
        guessing = guessing_us / self._alone_us if self._alone_us > 0 else 0.0
        rows = max(1, self._rows)
        before = (rows + won) / self._costs[offered]
        best, best_width, best_gain = before * GAIN_MIN, 0, 0.0
        gain, chance = 0.0, 1.0
        for width in range(1, min(len(rates), STEP_DRAFTS_MAX - offered) + 1):
            chance *= rates[width - 1]
            gain += chance
            value = (rows + won + gain) / (self._costs[offered + width] + guessing * width)
            if value > best:
                best, best_width, best_gain = value, width, gain
        return best_width, best_gain

    def _look_up(self, context: int) -> None:
        """What steps with drafted tokens cost beside one without any."""
        self._steps_left = REFRESH_STEPS
        model, rows = self._scheduler.cost_model(), max(1, self._rows)
        alone = model.predict_us(decode_rows=rows, decode_context=rows * context)
        self._alone_us = alone
        if alone <= 0:
            self._costs = [1.0, *(1.0 + UNKNOWN_COST * (1 + width) for width in range(STEP_DRAFTS_MAX))]
            return
        self._costs = [1.0]
        for width in range(1, STEP_DRAFTS_MAX + 1):
            more = rows + width
            with_drafts = model.predict_us(decode_rows=more, decode_context=more * context)
            self._costs.append(max(1.0, (with_drafts + AHEAD_US) / alone))


def may_draft(sampling: SamplingParams) -> bool:
    """Whether what is sampled depends on the tokens before it by the model alone, or by a grammar, which goes back.

    Penalties and biases keep a state that moves with each token; a draft would have to move it back.
    """
    return not (sampling.penalized or sampling.logit_bias)

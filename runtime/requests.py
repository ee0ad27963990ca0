"""What goes into an engine and what comes out: requests, sampling parameters, outputs, counters.

An engine runs sequences. n choices of one request are n sequences with the same seed and choice 0..n-1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tokenrelay.base.deadlines import Deadline
from tokenrelay.base.errors import TokenRelayError
from tokenrelay.libscheduler import Handover

TokenIds = npt.NDArray[np.uint32]

# Bounds of what one request may ask; the router refuses earlier and names the parameter.
LOGIT_BIAS_MAX = 4096
STOP_TOKEN_IDS_MAX = 64
LOGPROBS_MAX = 64
GRAMMAR_CHARS_MAX = 1 << 21


class Finish(IntEnum):
    """Why a sequence ended; other than NONE it is the one terminal output. Same numbers as on the wire."""

    NONE = 0
    STOP = 1
    LENGTH = 2
    ABORT = 3
    REJECTED = 4
    ERROR = 5
    HANDOVER = 6  # its first token was not its last, and a peer goes on from its KV


class Reject(IntEnum):
    """Why a sequence was refused at admission. Same numbers as on the wire."""

    NONE = 0
    QUEUE_FULL = 1
    PROMPT_TOO_LONG = 2
    DUPLICATE_ID = 3
    DRAINING = 4
    INVALID = 5
    PARENT_UNKNOWN = 6


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token of a sequence is chosen. Random numbers are keyed by (seed, choice, output position)."""

    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0  # 1: off
    top_k: int = 0  # 0: off
    min_p: float = 0.0  # 0: off
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0  # 1: off
    logit_bias: tuple[tuple[int, float], ...] = ()
    tokens_min: int = 0  # `end_token_ids` are masked until so many output tokens
    end_token_ids: tuple[int, ...] = ()
    logprobs: int = 0  # 0: none, k + 1: the sampled token's and those of the k most likely
    seed: int = 0  # 64 bits, unsigned
    choice: int = 0
    grammar: str = ""  # what the output must be (executor/grammars.py); empty: anything

    @property
    def penalized(self) -> bool:
        """Whether the tokens so far change the next one's logits."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0

    def problem(self, vocab_size: int) -> str | None:
        """Why this cannot be run, or None."""
        numbers = (self.temperature, self.top_p, self.min_p, self.presence_penalty, self.frequency_penalty)
        if not all(map(math.isfinite, (*numbers, self.repetition_penalty))):
            return "a sampling parameter is not a finite number"
        checks = (
            (self.temperature >= 0, "temperature is negative"),
            (0 < self.top_p <= 1, "top_p is outside (0, 1]"),
            (0 <= self.top_k < 2**31, "top_k is out of range"),
            (0 <= self.min_p <= 1, "min_p is outside [0, 1]"),
            (self.repetition_penalty > 0, "repetition_penalty is not positive"),
            (0 <= self.logprobs <= LOGPROBS_MAX + 1, f"more than {LOGPROBS_MAX} top_logprobs"),
            (0 <= self.tokens_min < 2**31, "tokens_min is out of range"),
            (0 <= self.seed < 2**64, "seed is not a 64-bit number"),
            (0 <= self.choice < 2**31, "choice is out of range"),
            (len(self.grammar) <= GRAMMAR_CHARS_MAX, f"the grammar is longer than {GRAMMAR_CHARS_MAX} characters"),
            (len(self.logit_bias) <= LOGIT_BIAS_MAX, f"more than {LOGIT_BIAS_MAX} logit_bias entries"),
            (len(self.end_token_ids) <= STOP_TOKEN_IDS_MAX, f"more than {STOP_TOKEN_IDS_MAX} stop token ids"),
            (all(0 <= t < vocab_size for t, _ in self.logit_bias), "a logit_bias token is outside the vocabulary"),
            (not any(math.isnan(bias) for _, bias in self.logit_bias), "a logit_bias is not a number"),
        )
        return next((message for ok, message in checks if not ok), None)


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One sequence to run. `token_ids` belongs to the engine from here on."""

    sequence_id: int  # unique while it is open
    token_ids: TokenIds  # prompt, then output emitted elsewhere already (migration); behind what the parent gives
    output_start: int  # where the prompt ends
    tokens_max: int  # output tokens at most, those already in token_ids included
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_token_ids: tuple[int, ...] = ()  # the model's own end tokens included, where wanted
    priority: int = 0  # lower runs first
    salt: bytes = b""  # the tenant's
    tenant: bytes = b""  # tenants of a priority class get equal shares; empty: the salt tells them apart
    deadline: Deadline = field(default_factory=Deadline.never)
    request_id: str = ""  # for logs
    parent: int | None = None  # the sequence whose first `parent_tokens` tokens the prompt begins with
    parent_tokens: int = 0
    tools: bool = False  # a hint: it may end with a tool call, whose results come back as its next turn
    expected_tokens: int = 0  # a hint: output tokens it will likely have; 0: nobody says
    tps_floor: int = 0  # tokens a second that its user keeps, in place of the worker's floor; 0: that one
    handover: Handover = Handover.NONE  # what becomes of its KV (runtime/handover.py)

    def problem(self, vocab_size: int) -> str | None:
        """Why this cannot be run, or None. The scheduler checks lengths against its context."""
        size = self.token_ids.size + self.parent_tokens
        if self.token_ids.size == 0:
            return "the prompt is empty"
        if self.parent is not None and self.parent_tokens <= 0:
            return f"parent_tokens is {self.parent_tokens}: nothing comes from the parent"
        if int(self.token_ids.max()) >= vocab_size:
            return f"token id {int(self.token_ids.max())} is outside the vocabulary of {vocab_size}"
        if not 0 < self.output_start <= size:
            return f"the output begins at {self.output_start}, outside the {size} tokens"
        if self.tokens_max <= size - self.output_start:
            return f"tokens_max is {self.tokens_max}: nothing is left to generate"
        if len(self.stop_token_ids) > STOP_TOKEN_IDS_MAX:
            return f"more than {STOP_TOKEN_IDS_MAX} stop token ids"
        return self.sampling.problem(vocab_size)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms, of the model's own distribution (before temperature, penalties and bias)."""

    logprob: float
    top_token_ids: Sequence[int]  # most likely first
    top_logprobs: Sequence[float]


@dataclass(slots=True)
class EngineOutput:
    """What one step (or an event outside of one) brought for one sequence."""

    sequence_id: int
    token_ids: Sequence[int] = ()
    finish: Finish = Finish.NONE
    first: bool = False  # holds the sequence's first new token
    cached_tokens: int = 0  # prompt tokens that were not computed; with `first`
    waited_us: int = 0  # from its submission to the step that admitted it; with `first`
    logprobs: Sequence[TokenLogprobs] | None = None  # one per token, when asked for
    reject: Reject = Reject.NONE
    error: TokenRelayError | None = None


class FloorStats(NamedTuple):
    """How the TPS floor fares, in tokens per second of one user. A late token is missing by more than its own time."""

    configured: float = 0.0  # 0: no floor
    in_force: float = 0.0  # the smaller of it and a fraction of `batch_1`; 0: none, or not known yet
    batch_1: float = 0.0  # what one user alone would get now
    users_below: int = 0  # in the last step
    tokens: int = 0  # that were due
    tokens_late: int = 0  # of those
    overrides: int = 0  # admitted past their age although the floor would have kept them back


@dataclass(frozen=True, slots=True)
class HostStats:
    """The host tier of the KV pool. All 0: there is none."""

    block_bytes: int = 0  # of one block, all layers
    blocks: int = 0  # that it has room for
    blocks_used: int = 0
    copies_late: int = 0  # in flight, past their deadline
    blocks_stored: int = 0  # written back from the device
    blocks_loaded: int = 0
    loads: int = 0  # prompts that waited for one
    tokens_loaded: int = 0  # of those prompts, that were not computed
    copies_failed: int = 0
    copies_expired: int = 0


class DraftStats(NamedTuple):
    """Drafts that steps computed. All 0: nobody drafts."""

    drafts: int = 0
    tokens: int = 0  # of those
    accepted: int = 0  # of those tokens, that came true
    proposer: str = ""  # where they come from: ngram (the text) or mtp (a prediction layer)


class EngineStats(NamedTuple):
    """Counters as of the last step. blocks_free + blocks_cached + blocks_active is the pool.

    Made at each turn of the engine's loop: a tuple costs a third of a frozen dataclass.
    """

    blocks_free: int = 0
    blocks_cached: int = 0
    blocks_active: int = 0  # of these:
    blocks_writable: int = 0
    blocks_in_flight: int = 0
    blocks_quarantined: int = 0
    blocks_sealed: int = 0
    sequences_waiting: int = 0
    sequences_running: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    aborts: int = 0
    step_time_us: int = 0  # time spent running steps, in all
    integrity_checks: int = 0  # of the scheduler's books, while idle
    integrity_failures: int = 0  # then the engine ends
    integrity_check_us: int = 0  # time they took, in all
    floor: FloorStats = FloorStats()
    host: HostStats = HostStats()
    drafts: DraftStats = DraftStats()

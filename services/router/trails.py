"""What happened to each request, for the page: a few notes on its way, kept for a while after its end.

    trail = trails.begin("req-1", prompt_tokens=812)
    trail.note("submitted", worker="unix:/run/w0.sock")
    trail.note("first_token")
    trail.end("stop")
    trails.recent(50)                      # newest first

A note costs one small tuple, and a request makes a handful of them, none per token. Everything is bounded: notes of a
trail, trails, first tokens and speeds that were measured. Event loop only.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from dataclasses import dataclass
from typing import Final, Literal

TRAILS_MAX = 256
NOTES_MAX = 48  # of one trail; its end is noted in any case
SENT = ("submitted", "prefill")
SAMPLES_MAX = 4096  # since somebody looked last
SPEED_TOKENS_MIN = 4  # a shorter answer has no speed of its own

Samples = deque[tuple[float, float]]
Kind = Literal[
    "submitted",  # to the worker that computes and decodes it
    "prefill",  # to the worker that computes its prompt; `to` goes on with it
    "started",  # the step that admitted it
    "offered",  # that worker has made a handle of its KV, which `to` claims
    "first_token",
    "handed_over",  # the first token of the worker that took the KV
    "handover_failed",
    "parked",  # no worker is usable: it waits for one
    "moved",  # its worker died, drained or was full: it goes on elsewhere
    "ended",
]


@dataclass(frozen=True, slots=True)
class Note:
    """One thing that happened, so many seconds after the request arrived."""

    at_s: float
    kind: Kind
    choice: int
    worker: str
    to: str
    detail: str


class Trail:
    """One request's. `ended_s` and `outcome` are set once it is over."""

    __slots__ = (
        "_owner",
        "arrived_s",
        "cached_tokens",
        "choices",
        "ended_s",
        "first_s",
        "notes",
        "number",
        "outcome",
        "output_tokens",
        "placement",
        "prompt_tokens",
        "request_id",
    )

    def __init__(
        self, owner: Trails, number: int, request_id: str, arrived_s: float, prompt_tokens: int, choices: int
    ) -> None:
        self._owner = owner
        self.number = number
        self.request_id = request_id
        self.arrived_s = arrived_s
        self.prompt_tokens = prompt_tokens
        self.choices = choices
        self.cached_tokens = 0
        self.output_tokens = 0
        self.first_s: float | None = None  # after the arrival
        self.ended_s: float | None = None
        self.outcome = ""
        self.placement = ""
        self.notes: list[Note] = []

    def note(self, kind: Kind, *, choice: int = 0, worker: str = "", to: str = "", detail: str = "") -> None:
        """Something happened now."""
        if self.ended_s is None and len(self.notes) < NOTES_MAX:
            self.notes.append(Note(time.monotonic() - self.arrived_s, kind, choice, worker, to, detail))
            if kind == "prefill":
                self._owner.handovers.append((self, choice))

    def first_token(self, cached_tokens: int, choice: int, waited_us: int = 0) -> None:
        """A choice has its first token; the first of them counts. `waited_us`: at its worker, before its prompt."""
        if self.first_s is None:
            self.first_s = time.monotonic() - self.arrived_s
            self._owner.first_tokens.append((time.monotonic(), self.first_s))
        if choice == 0:
            self.cached_tokens = cached_tokens
        if waited_us:
            self._note_start(choice, waited_us / 1e6)
        self.note("first_token", choice=choice)

    def _note_start(self, choice: int, waited_s: float) -> None:
        """When the prompt was begun with, which is known only now: so long after it was sent there."""
        sent = next((one for one in reversed(self.notes) if one.choice == choice and one.kind in SENT), None)
        if sent is None or len(self.notes) >= NOTES_MAX:
            return
        at_s = min(sent.at_s + waited_s, time.monotonic() - self.arrived_s)
        self.notes.append(Note(at_s, "started", choice, sent.worker, "", ""))
        self.notes.sort(key=lambda note: note.at_s)

    def end(self, outcome: str, output_tokens: int = 0) -> None:
        """It is over; the first end counts. `outcome`: a finish reason or an error's code."""
        if self.ended_s is not None:
            return
        ended_s = time.monotonic() - self.arrived_s
        self.output_tokens, self.outcome = output_tokens, outcome
        self.notes.append(Note(ended_s, "ended", 0, "", "", outcome))
        self.ended_s = ended_s
        if self.first_s is not None and output_tokens >= SPEED_TOKENS_MIN * self.choices and ended_s > self.first_s:
            tokens_a_choice = output_tokens / self.choices - 1
            self._owner.speeds.append((time.monotonic(), tokens_a_choice / (ended_s - self.first_s)))


class Trails:
    """Those of the last requests."""

    def __init__(self, trails_max: int = TRAILS_MAX) -> None:
        self._trails: deque[Trail] = deque(maxlen=trails_max)
        self._numbers = itertools.count(1)
        self.handovers: deque[tuple[Trail, int]] = deque(maxlen=trails_max)  # sequences with two legs: trail, choice
        # Samples with the instant they were taken at, for who looks to take away: seconds from a request's arrival to
        # its first token; tokens per second of answers that ended.
        self.first_tokens: Samples = deque(maxlen=SAMPLES_MAX)
        self.speeds: Samples = deque(maxlen=SAMPLES_MAX)

    def begin(self, request_id: str, *, prompt_tokens: int, choices: int = 1, arrived_s: float | None = None) -> Trail:
        """A request has come."""
        arrived_s = time.monotonic() if arrived_s is None else arrived_s
        trail = Trail(self, next(self._numbers), request_id, arrived_s, prompt_tokens, choices)
        self._trails.append(trail)
        return trail

    def recent(self, count: int) -> list[Trail]:
        """The newest first, so many at most."""
        return list(itertools.islice(reversed(self._trails), count))

    def find(self, request_id: str) -> Trail | None:
        """The newest of that name."""
        return next((trail for trail in reversed(self._trails) if trail.request_id == request_id), None)


@dataclass(frozen=True, slots=True)
class ChoiceTrail:
    """A trail, as one of its request's sequences notes things there."""

    trail: Trail
    choice: int

    def note(self, kind: Kind, *, worker: str = "", to: str = "", detail: str = "") -> None:
        """Something happened to it now."""
        self.trail.note(kind, choice=self.choice, worker=worker, to=to, detail=detail)


NO_TRAIL: Final = Trail(Trails(trails_max=1), 0, "", 0.0, 0, 1)  # of sequences that nobody watches
NO_TRAIL.ended_s = 0.0  # it takes no notes

"""Questions to the engine: why is a request where it is? Asked from any thread, answered by the loop between two steps.

    future = engine.explain("req-7")            # or "" for all that are open
    answer = future.result(timeout=5)           # Answer: what the scheduler says of each of its sequences

The scheduler belongs to the engine's thread, so a question waits in a bounded queue until the loop comes by: some
microseconds when it sleeps, and never longer than planning a step. Nothing is computed or kept for who does not ask.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice

from tokenrelay.base.errors import Overloaded, TokenRelayError
from tokenrelay.libscheduler import Explanation, Scheduler
from tokenrelay.runtime.requests import EngineRequest

QUESTIONS_MAX = 64  # that wait
SEQUENCES_MAX = 256  # in one answer: each costs a look at all waiting sequences


@dataclass(frozen=True, slots=True)
class Explained:
    """One sequence of a request."""

    request_id: str
    choice: int
    explanation: Explanation


@dataclass(frozen=True, slots=True)
class Answer:
    """What is known of the open sequences that were asked for, in the order they came."""

    sequences: tuple[Explained, ...]
    left_out: int  # beyond SEQUENCES_MAX


class Questions:
    """Those that wait. `ask` and `fail` are called under the engine's lock, the rest by its thread."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[str, Future[Answer]]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def ask(self, request_id: str) -> Future[Answer]:
        """Raises Overloaded when too many wait."""
        if len(self._waiting) >= QUESTIONS_MAX:
            raise Overloaded(f"{len(self._waiting)} questions wait for the engine")
        future: Future[Answer] = Future()
        self._waiting.append((request_id, future))
        return future

    def answer(self, scheduler: Scheduler, requests: Mapping[int, EngineRequest]) -> None:
        """Answer the oldest one. `requests`: those in the scheduler, by sequence."""
        request_id, future = self._waiting.popleft()
        if not future.set_running_or_notify_cancel():
            return  # whoever asked has gone
        wanted = [one for one in requests.values() if not request_id or one.request_id == request_id]
        found = []
        for one in islice(wanted, SEQUENCES_MAX):
            explanation = scheduler.explanation(one.sequence_id)
            if explanation is not None:
                found.append(Explained(one.request_id, one.sampling.choice, explanation))
        future.set_result(Answer(tuple(found), max(0, len(wanted) - SEQUENCES_MAX)))

    def fail(self, error: TokenRelayError) -> None:
        """The loop is over: nobody will answer."""
        while self._waiting:
            _, future = self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

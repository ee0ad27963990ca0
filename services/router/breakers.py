"""Workers that fail again and again get a pause, and failing requests do not become a storm of retries.

    breakers.failed("unix:/run/w1.sock")         # three of them in a row, with no success between: it pauses
    breakers.allowed(workers)                    # those without a pause; all of them, if everybody has one
    breakers.sent(worker.target)                 # the one request that tries a worker whose pause is over
    breakers.succeeded("unix:/run/w1.sock")

    budget.earn()                                # a request came
    if budget.spend(): ...                       # it may be tried again elsewhere

A worker that is not connected is not usable in any case; a breaker is for one that takes requests and fails them, or
dies of them and comes back. Of a request with two legs the leg that failed is counted, so that prefill workers that
fail leave decode workers in use, which then compute prompts themselves. What one event ends at once (a worker that dies
with all it had) is one failure.

The budget is what Finagle and Envoy have: retries may be a share of requests. The first move of a sequence whose worker
died is free: its client shall notice nothing, however many there are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

FAILURES_MAX: Final = 3
EVENT_S: Final = 0.1  # failures so close together are one
PAUSE_MIN_S: Final = 1.0
PAUSE_MAX_S: Final = 30.0
RETRY_SHARE: Final = 0.2  # of requests
RETRIES_SAVED_MAX: Final = 100.0


class _Worker(Protocol):
    target: str


WorkerT = TypeVar("WorkerT", bound=_Worker)


@dataclass(slots=True)
class _State:
    failures: int = 0  # in a row
    failed_s: float = 0.0
    pause_s: float = 0.0
    until_s: float = 0.0  # the pause's end; 0: it has none


class Breakers:
    """Of all workers of one router. Only workers that failed since they last succeeded have a state."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._states: dict[str, _State] = {}
        self.opened = 0  # pauses that began, ever

    def failed(self, target: str) -> None:
        """A worker failed a sequence, or died with it."""
        now_s = self._now()
        state = self._states.setdefault(target, _State())
        if state.failures and now_s - state.failed_s < EVENT_S:
            return
        state.failures, state.failed_s = state.failures + 1, now_s
        if state.failures >= FAILURES_MAX:
            state.pause_s = min(PAUSE_MAX_S, 2 * state.pause_s) if state.pause_s else PAUSE_MIN_S
            state.until_s = now_s + state.pause_s
            self.opened += 1

    def succeeded(self, target: str) -> None:
        """A worker brought a sequence to its end."""
        if self._states:
            self._states.pop(target, None)

    forget = succeeded

    def sent(self, target: str) -> None:
        """A sequence goes there. After a pause it is a trial: until its end, or another such pause, it stays alone."""
        state = self._states.get(target) if self._states else None
        if state is not None and state.until_s:
            state.until_s = self._now() + state.pause_s

    def open(self, target: str) -> bool:
        """Whether a worker pauses."""
        state = self._states.get(target)
        return state is not None and state.until_s > self._now()

    def allowed(self, workers: Sequence[WorkerT]) -> Sequence[WorkerT]:
        """Those that do not pause, or all where everybody does: a wrong guess must not end the service."""
        if not self._states:
            return workers
        return [worker for worker in workers if not self.open(worker.target)] or workers


class RetryBudget:
    """Retries that may still be made."""

    def __init__(self) -> None:
        self._saved = RETRIES_SAVED_MAX
        self.refused = 0  # retries that were not made, ever

    def earn(self) -> None:
        """A request came."""
        if self._saved < RETRIES_SAVED_MAX:
            self._saved += RETRY_SHARE

    def spend(self) -> bool:
        """Whether one may be made now."""
        if self._saved < 1.0:
            self.refused += 1
            return False
        self._saved -= 1.0
        return True

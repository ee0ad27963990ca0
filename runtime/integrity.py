"""The integrity check of the scheduler's books, for when the engine is idle.

    books = Books(scheduler.check)
    books.touched()                 # something was submitted, aborted or run
    books.due_s()                   # how long until a check is due; None: nothing changed since the last one
    books.check()                   # raises IntegrityError

A check looks at everything (O(blocks + sequences), 7 ms for 100,000 blocks, without the GIL), so it runs
once after the engine became idle, and not more often than every `INTERVAL_S`. When it fails, whatever the worker would
do next might give one request's KV to another: the engine ends, its process is started anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from tokenrelay.base.errors import TokenRelayError
from tokenrelay.base.logging import get_logger

log = get_logger("engine")

INTERVAL_S = 10.0


class IntegrityError(TokenRelayError):
    """The scheduler's books are broken: a programmer's error, or memory that was overwritten. Nothing goes on."""


class Books:
    """When the check is due, and what came of it. Engine's thread only."""

    def __init__(self, check: Callable[[], None], now_s: Callable[[], float] = time.monotonic) -> None:
        """`check` raises AssertionError with what is broken."""
        self._check = check
        self._now_s = now_s
        self._changed = False
        self._checked_at_s = float("-inf")
        self.checks = 0
        self.failures = 0
        self.check_us = 0  # in all

    def touched(self) -> None:
        """Something changed: a check is due when the engine is idle again."""
        self._changed = True

    def due_s(self) -> float | None:
        """Seconds until a check is due, 0 when it is now; None: the books are as they were checked."""
        if not self._changed:
            return None
        return max(0.0, self._checked_at_s + INTERVAL_S - self._now_s())

    def check(self) -> None:
        """Look at everything. Raises IntegrityError."""
        self._changed = False
        self._checked_at_s = self._now_s()
        self.checks += 1
        began_ns = time.perf_counter_ns()
        try:
            self._check()
        except AssertionError as error:
            self.failures += 1
            log.error("the scheduler's books are broken; the worker ends", broken=str(error))
            raise IntegrityError(f"the scheduler's books are broken: {error}") from error
        finally:
            self.check_us += (time.perf_counter_ns() - began_ns) // 1000

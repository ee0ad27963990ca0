"""The host tier as the engine's loop sees it: copies out, their ends in, and what is late said.

tier = TierPort(scheduler, post)
tier.attach(copier)             # before the engine starts; without one there is no tier
tier.turn()                     # after each plan
tier.left_s()                   # until the next copy is late; None without one
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from tokenrelay.base.logging import get_logger
from tokenrelay.libscheduler import Copies, Scheduler

log = get_logger("engine")

OnEnded = Callable[[list[int], list[int]], None]  # ids of copies that ended well, and in vain


class Starter(Protocol):
    """Who copies (executor/host_tier.py), as the loop drives it."""

    @property
    def block_bytes(self) -> int:
        """Of one block, all layers."""

    def start(self, copies: Copies) -> None:
        """Queue copies; returns at once."""

    def close(self) -> None:
        """Let what was started end."""


class TierPort:
    """Everything but `ended` is for the engine's thread."""

    def __init__(self, scheduler: Scheduler, post: Callable[[Callable[[], None]], None]) -> None:
        """`post` runs something in the engine's thread."""
        self._scheduler = scheduler
        self._post = post
        self._copier: Starter | None = None
        self._unposted: list[tuple[list[int], list[int]]] = []  # while closing nobody runs what is posted

    @property
    def block_bytes(self) -> int:
        """Of one block, all layers; 0 without a tier."""
        return 0 if self._copier is None else self._copier.block_bytes

    def attach(self, copier: Starter) -> None:
        """Before the engine starts."""
        self._copier = copier

    def ended(self, done: list[int], failed: list[int]) -> None:
        """From the copier's thread: nobody reads or writes for these copies any more."""
        self._unposted.append((done, failed))  # appended and taken out whole: both are atomic
        self._post(self._take_ended)

    def turn(self) -> None:
        """Hand over what the scheduler wants copied since the last turn."""
        if self._copier is None:
            return
        copies = self._scheduler.take_copies()
        if copies is not None:
            self._copier.start(copies)
        if late := self._scheduler.take_late_copies():
            loads = sum(copy.load for copy in late)
            log.error("copies to or from host memory are late", loads=loads, write_backs=len(late) - loads)

    def left_s(self) -> float | None:
        """Seconds until the scheduler must be asked for a plan, so that it finds a late copy."""
        deadline_us = self._scheduler.copy_deadline_us() if self._copier is not None else None
        return None if deadline_us is None else max(0.0, deadline_us / 1e6 - time.monotonic())

    def close(self) -> None:
        """Wait for the copies in flight, whose ends the scheduler then knows. Idempotent."""
        if self._copier is None:
            return
        self._copier.close()
        self._take_ended()

    def _take_ended(self) -> None:
        while self._unposted:
            done, failed = self._unposted.pop()
            self._scheduler.copied(done)
            self._scheduler.copy_failed(failed)

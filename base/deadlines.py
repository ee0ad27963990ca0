"""Deadlines on the monotonic clock. Across processes they travel as a duration left, never as an instant."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Deadline:
    """An instant on this process's monotonic clock; `at_s` is infinite when there is none."""

    at_s: float

    @staticmethod
    def after(duration_s: float) -> Deadline:
        """The deadline `duration_s` seconds from now."""
        return Deadline(time.monotonic() + duration_s)

    @staticmethod
    def never() -> Deadline:
        """No deadline."""
        return Deadline(float("inf"))

    def left_s(self) -> float:
        """Seconds left, at least 0."""
        return max(0.0, self.at_s - time.monotonic())

    def left_ms(self) -> int:
        """Whole milliseconds left for the wire; 0 means none there, so an expired deadline travels as 1."""
        return 0 if self.at_s == float("inf") else max(1, int(self.left_s() * 1000))

    @property
    def passed(self) -> bool:
        """Whether it is over."""
        return time.monotonic() >= self.at_s

"""Token buckets: so much a minute, and as much at once after a quiet minute.

bucket = Bucket(60, now_s)
bucket.wait_s(now_s)        # 0.0, or how long until one is there
bucket.take(1, now_s)       # may go below zero where the cost is known only afterwards: then the next ones wait
"""

from __future__ import annotations

WINDOW_S = 60.0


class Bucket:
    """Holds `per_minute` at most, and is filled at that rate. 0: no limit."""

    __slots__ = ("_at_s", "_level", "per_minute")

    def __init__(self, per_minute: int, now_s: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at_s = now_s

    def change(self, per_minute: int, now_s: float) -> None:
        """Another limit from now on; what was used stays used."""
        self._fill(now_s)
        self._level += per_minute - self.per_minute
        self.per_minute = per_minute

    def wait_s(self, now_s: float, need: float = 1.0) -> float:
        """How long until `need` of it is there."""
        if not self.per_minute:
            return 0.0
        self._fill(now_s)
        missing = min(need, self.per_minute) - self._level
        return missing * WINDOW_S / self.per_minute if missing > 0 else 0.0

    def take(self, amount: float, now_s: float) -> None:
        """Use so much; a negative amount gives back what was taken in vain."""
        if self.per_minute:
            self._fill(now_s)
            self._level = min(self._level - amount, float(self.per_minute))

    def left(self, now_s: float) -> int:
        """How much of it is there, whole."""
        self._fill(now_s)
        return max(0, int(self._level))

    def _fill(self, now_s: float) -> None:
        passed_s = now_s - self._at_s
        if passed_s > 0:
            self._level = min(float(self.per_minute), self._level + passed_s * self.per_minute / WINDOW_S)
            self._at_s = now_s

"""Says in the log when the TPS floor is not held, at a bounded rate.

watch = FloorWatch()
watch.look(stats.floor, stats.sequences_running)     # at each turn of the engine's loop
"""

from __future__ import annotations

import time
from collections.abc import Callable

from tokenrelay.base.logging import get_logger
from tokenrelay.runtime.requests import FloorStats

log = get_logger("engine")

INTERVAL_S = 30.0  # between two lines, at least
LATE_SHARE = 0.05  # of the tokens since the last line: fewer are a pause, not a floor that is not held


class FloorWatch:
    """Compares the counters with those of the last line."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._said_at_s: float | None = None
        self._said = FloorStats()
        self._lowered = False

    def look(self, floor: FloorStats, running: int) -> None:
        """A line if many tokens came late since the last one, or when batch 1 allows no such floor as was asked for."""
        late = floor.tokens_late - self._said.tokens_late
        lowered = 0 < floor.in_force < floor.configured
        if not late and lowered == self._lowered:
            return
        now_s = self._clock_s()
        if self._said_at_s is not None and now_s - self._said_at_s < INTERVAL_S:
            return
        due = floor.tokens - self._said.tokens
        if late > LATE_SHARE * due:
            log.warning("the TPS floor is not held", **_facts(floor), running=running, tokens=due, tokens_late=late)
        elif lowered and not self._lowered:
            log.warning(
                "this device is too slow at batch 1 for the TPS floor; a lower one is in force", **_facts(floor)
            )
        elif lowered == self._lowered:
            return
        self._said_at_s, self._said, self._lowered = now_s, floor, lowered


def _facts(floor: FloorStats) -> dict[str, float]:
    return {
        "configured_tps": floor.configured,
        "in_force_tps": round(floor.in_force, 1),
        "batch_1_tps": round(floor.batch_1, 1),
    }

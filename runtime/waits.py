"""How long each sequence waited between its submission and the step that admitted it. The engine's thread only.

waits.submitted(7); waits.admitted([7]); waits.take(7)      # microseconds
"""

from __future__ import annotations

import time
from collections.abc import Iterable


class Waits:
    """One small entry for each open sequence, until its first token is told."""

    def __init__(self) -> None:
        self._since_s: dict[int, float] = {}  # of those that wait
        self._waited_us: dict[int, int] = {}  # of those that were admitted

    def submitted(self, sequence_id: int) -> None:
        """It is in the scheduler's queue."""
        self._since_s[sequence_id] = time.monotonic()

    def admitted(self, sequence_ids: Iterable[int]) -> None:
        """A plan has them; whoever was preempted and comes back does not count again."""
        for sequence_id in sequence_ids:
            since_s = self._since_s.pop(sequence_id, None)
            if since_s is not None:
                self._waited_us[sequence_id] = round(1e6 * (time.monotonic() - since_s))

    def take(self, sequence_id: int) -> int:
        """Microseconds it waited; 0 where that is not known."""
        return self._waited_us.pop(sequence_id, 0)

    def forget(self, sequence_id: int) -> None:
        """It is over."""
        self._since_s.pop(sequence_id, None)
        self._waited_us.pop(sequence_id, None)

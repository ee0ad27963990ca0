"""Wakes one sleeper, for a third of what a condition costs.

bell = Bell()
with lock: ...; bell.ring()                      # any thread, after it wrote down why
with lock: bell.quiet(); look what is there      # the sleeper, again and again
bell.wait(timeout_s)                             # where nothing was, without the lock
"""

from __future__ import annotations

import contextlib
import queue


class Bell:
    """Rings that nobody has answered are one. `ring` and `quiet` hold the owner's lock, `wait` does not."""

    def __init__(self) -> None:
        self._rung = False
        self._rings: queue.SimpleQueue[None] = queue.SimpleQueue()  # one entry at most

    def ring(self) -> None:
        """The next `wait` returns at once."""
        if not self._rung:
            self._rung = True
            self._rings.put(None)

    def quiet(self) -> None:
        """The sleeper is awake and looks itself: whoever rings from now on is heard by its next `wait`."""
        if self._rung:
            self._rung = False
            if not self._rings.empty():
                self._rings.get_nowait()

    def wait(self, timeout_s: float | None) -> None:
        """Until somebody rings, or rang since `quiet`; None: for ever."""
        with contextlib.suppress(queue.Empty):
            self._rings.get(timeout=timeout_s)

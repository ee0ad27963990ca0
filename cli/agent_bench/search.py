"""Which loads to try: those that were asked for, or a search for the largest that keeps the floor.

    search = Search(settings)
    while (load := search.next()) is not None:
        search.result(load, held)

The search doubles until a load does not hold (or halves until one does), then cuts the gap in half a few times. A load
that holds above one that did not is not looked for: more users never make users faster.
"""

from __future__ import annotations

import math

from tokenrelay.cli.agent_bench.records import Settings

CUTS_MAX = 3
HALVINGS_MAX = 4  # of a trace's rate; there is less than one user of nothing


class Search:
    """Over users (whole numbers) or factors on a trace's rate."""

    def __init__(self, settings: Settings) -> None:
        self._given = list(settings.loads)
        self._searching = not self._given
        self._whole = settings.closed
        self._max = settings.load_max
        self._held: float | None = None
        self._failed: float | None = None
        self._cuts = 0
        self._halvings = 0

    @property
    def steps_left(self) -> int:
        """At most so many loads are still to come, for a progress bar; a guess while it doubles."""
        if not self._searching:
            return len(self._given)
        if self._failed is None:
            tried = self._held or 0.5
            return CUTS_MAX + 1 + max(0, math.ceil(math.log2(max(1.0, self._max / tried))) // 2)
        return CUTS_MAX - self._cuts

    def next(self) -> float | None:
        """The next load; None: that was all."""
        if not self._searching:
            return self._given.pop(0) if self._given else None
        if self._failed is None:
            load = 1.0 if self._held is None else min(2 * self._held, self._max)
            return None if load == self._held else load
        if self._held is None:
            self._halvings += 1
            return None if self._whole or self._halvings > HALVINGS_MAX else self._failed / 2
        self._cuts += 1
        middle = (self._held + self._failed) / 2
        load = float(round(middle)) if self._whole else round(middle, 3)
        return load if self._cuts <= CUTS_MAX and self._held < load < self._failed else None

    def result(self, load: float, held: bool) -> None:
        """What came of it."""
        if held:
            self._held = max(load, self._held or 0.0)
        else:
            self._failed = min(load, self._failed or math.inf)

"""From the engine's thread to the event loop: one wake-up per step, bounded.

    mailbox = LoopMailbox(loop, take, items_max=65536)
    mailbox.post(outputs, stats)        # any thread; take([(outputs, stats), …]) runs on the loop

Posts that come before the loop gets round to it are handed over together. When the loop lags `items_max` items behind,
`post` waits for it: the one place where an engine waits for anybody, and only for its own process.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sized
from typing import Generic, TypeVar

from tokenrelay.base.errors import Unavailable

Batch = TypeVar("Batch", bound=Sized)
Extra = TypeVar("Extra")

WAIT_MAX_S = 30.0  # an event loop that is stuck for so long does not come back


class LoopMailbox(Generic[Batch, Extra]):
    """A bounded queue with one event loop as its reader."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        take: Callable[[list[tuple[Batch, Extra]]], None],
        *,
        items_max: int = 65536,
    ) -> None:
        self._loop = loop
        self._take = take
        self._items_max = items_max
        self._posts: list[tuple[Batch, Extra]] = []
        self._items = 0
        self._room = threading.Condition()
        self._closed = False

    def post(self, batch: Batch, extra: Extra) -> None:
        """Hand over. Raises Unavailable when the loop has not read for `WAIT_MAX_S`."""
        with self._room:
            if self._closed:
                return
            if not self._room.wait_for(lambda: self._items < self._items_max or self._closed, WAIT_MAX_S):
                raise Unavailable(f"the event loop did not read for {WAIT_MAX_S} s")
            first = not self._posts
            self._posts.append((batch, extra))
            self._items += len(batch)
            if first and not self._closed:
                self._loop.call_soon_threadsafe(self._read)

    def close(self) -> None:
        """Drop what comes from now on: the loop is about to end."""
        with self._room:
            self._closed = True
            self._room.notify_all()

    def _read(self) -> None:
        with self._room:
            posts, self._posts = self._posts, []
            self._items = 0
            self._room.notify_all()
        self._take(posts)

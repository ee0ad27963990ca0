"""What waits for one watcher: bounded, the latest of each handle; a watcher that lags is told to look anew."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable

from tokenrelay.ledger.api import DutyDue, HandleChanged, MemberEnded, MemberJoined, Notice, Suspended

NOTICES_MAX = 4096


class NoticeQueue:
    """Notices of one watcher. `take` gives what waits, or None: something was lost, begin with a Snapshot."""

    def __init__(self, notices_max: int = NOTICES_MAX, wake: Callable[[], None] | None = None) -> None:
        """`wake` is called whenever something comes to wait; without it, `wait` is there."""
        self._notices_max = notices_max
        self._notices: dict[Hashable, Notice] = {}
        self._waiting = asyncio.Event()
        self._wake = wake or self._waiting.set
        self.gap = True  # nothing is known yet
        self.ended = False
        self.gaps = 0

    def put(self, notice: Notice) -> None:
        """Add, in the place of an older one about the same thing."""
        if self.gap and not isinstance(notice, Suspended):
            return  # the Snapshot will say it
        key = _key(notice)
        self._notices.pop(key, None)
        if len(self._notices) >= self._notices_max:
            self._notices.clear()
            self.gap = True
            self.gaps += 1
        else:
            self._notices[key] = notice
        self._wake()

    def restart(self) -> None:
        """Begin with a Snapshot again."""
        self._notices.clear()
        self.gap = True
        self._wake()

    def end(self, notice: Notice) -> None:
        """The watcher's own life is over: the last notice."""
        self._notices[_key(notice)] = notice
        self.gap = False
        self.ended = True
        self._wake()

    def take(self) -> list[Notice]:
        """What waits, oldest first. With `gap` set, a Snapshot must come first: the caller makes it and clears it."""
        notices = list(self._notices.values())
        self._notices.clear()
        return notices

    async def wait(self) -> None:
        """Until something waits."""
        await self._waiting.wait()
        self._waiting.clear()


def _key(notice: Notice) -> Hashable:
    match notice:
        case HandleChanged(view):
            return view.handle
        case DutyDue(handle, _):
            return ("duty", handle)
        case MemberJoined(member):
            return ("member", member.actor)
        case MemberEnded(actor, _):
            return ("ended", actor)
        case _:
            return type(notice).__name__

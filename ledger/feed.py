"""A worker's cache events on their way to the fleet's directory: numbered, bounded, told anew after every gap.

    feed = DirectoryFeed(directory, member.actor)
    feed.start()
    feed.publish([("sealed", block_hash), …])       # never waits
    feed.renew()                                    # another kvstore, which may know nothing

A directory that cannot be reached costs nothing but its knowledge: what waited is forgotten, and all is told when it
is back. What the worker holds is remembered here, bounded by its pool.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

from tokenrelay.base.logging import get_logger
from tokenrelay.ledger.api import Actor, Applied, CacheEvent, Code, Directory

log = get_logger("feed")

WAITING_MAX = 1 << 16  # events; above this all is told anew
RETRY_MIN_S, RETRY_MAX_S = 0.1, 5.0
RENEW_SPREAD_S = 0.5  # the workers of a fleet do not tell everything in one instant


class DirectoryFeed:
    """One worker in one life. Event loop only."""

    def __init__(self, directory: Directory, actor: Actor) -> None:
        self.held: dict[bytes, None] = {}
        self.resyncs = 0  # done, ever
        self._directory = directory
        self._actor = actor
        self._sequence = 0  # of the last batch sent
        self._waiting: list[CacheEvent] = []
        self._tell_all = False
        self._renewed = False
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Send from now on."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=f"feed {self._actor.name}")

    async def stop(self) -> None:
        """Send no more."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def publish(self, events: Sequence[CacheEvent]) -> None:
        """What became cache, or ceased to be; a first event "lost" says that the worker itself dropped some."""
        for kind, block_hash in events:
            if kind == "sealed":
                self.held[block_hash] = None
            elif kind == "evicted":
                self.held.pop(block_hash, None)
            else:  # it tells too little from now on, never what is not there
                self.held.clear()
                self._tell_all = True
        if not self._tell_all:
            self._waiting += events
            if len(self._waiting) > WAITING_MAX:
                self._tell_all = True
        if self._tell_all:
            self._waiting.clear()
        self._wake()

    def renew(self) -> None:
        """Tell everything again, soon."""
        self._tell_all = self._renewed = True
        self._waiting.clear()
        self._wake()

    async def settled(self) -> None:
        """Until nothing waits to be sent."""
        await self._idle.wait()

    def _wake(self) -> None:
        self._idle.clear()
        self._work.set()

    async def _run(self) -> None:
        pause_s = RETRY_MIN_S
        while True:
            if not self._waiting and not self._tell_all:
                self._idle.set()
                await self._work.wait()
                self._work.clear()
                continue
            if self._renewed:
                self._renewed = False
                await asyncio.sleep(RENEW_SPREAD_S * random.random())
            code = await self._send()
            if code is None:
                pause_s = RETRY_MIN_S
            elif code is Code.STALE_INCARNATION:
                log.warning("this life is over: its cache is told to nobody", member=self._actor.name)
                self._idle.set()
                return
            else:
                self._tell_all = True
                self._waiting.clear()
                await asyncio.sleep(pause_s * (0.5 + random.random()))
                pause_s = min(2 * pause_s, RETRY_MAX_S)

    async def _send(self) -> Code | None:
        """The next batch, or everything. None: it is done, or to be told anew at once."""
        self._sequence += 1
        if self._tell_all:
            self._tell_all = False
            refusal = await self._directory.resync(self._actor, self._sequence, list(self.held))
            self.resyncs += refusal is None
            return None if refusal is None else refusal.code
        events, self._waiting = self._waiting, []
        answer = await self._directory.publish(self._actor, self._sequence, events)
        if answer is Applied.RESYNC:
            self._tell_all = True
            self._waiting.clear()
            return None
        return None if isinstance(answer, Applied) else answer.code

"""Writes down what was decided, behind it: the open handles and the members, in etcd, under the reign's guard.

    journal.put(b"…/handles/7", view)       # at once; the latest value of a key wins
    await journal.flushed(timeout_s=1)      # True when all that was put before is written

Decisions do not wait for it (the reign's memory is what counts); a successor finds what was written, and asks the
members for the rest (recovery.py). A write that finds another reign ends this one. Bounded by the number of keys.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

from tokenrelay.base.logging import get_logger
from tokenrelay.ledger.etcd import OPERATIONS_MAX, EtcdStore, StoreError, end_task

log = get_logger("journal")

RETRY_MIN_S, RETRY_MAX_S = 0.05, 1.0
GATHER_S = 0.005  # between two batches: a handle that comes and goes within is written once, or not at all


@dataclass(slots=True)
class _Entry:
    value: bytes | None  # None: delete the key
    since: int  # number of the first put that is not written
    latest: int  # of the last one


class Journal:
    """One writer. Event loop only."""

    def __init__(
        self,
        store: EtcdStore,
        *,
        guard: Callable[[], dict[bytes, bytes | None]],
        on_foreign: Callable[[str], None],
    ) -> None:
        self.writes = 0  # keys written, ever
        self.batches = 0
        self._store = store
        self._guard = guard
        self._on_foreign = on_foreign
        self._dirty: dict[bytes, _Entry] = {}  # in the order of `since`
        self._put = 0  # how often something was put
        self._waiting = asyncio.Event()
        self._hurry = asyncio.Event()  # somebody waits for it
        self._written = asyncio.Condition()
        self._task: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """Keys that are not written yet."""
        return len(self._dirty)

    def start(self) -> None:
        """Write from now on."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="journal")

    async def stop(self) -> None:
        """Write no more, and forget what is not written."""
        task, self._task = self._task, None
        await end_task(task)
        self.clear()

    def clear(self) -> None:
        """Forget what is not written: another one reigns."""
        self._dirty.clear()

    def put(self, key: bytes, value: bytes | None) -> None:
        """Write it soon; None: delete it."""
        self._put += 1
        entry = self._dirty.get(key)
        if entry is None:
            self._dirty[key] = _Entry(value, self._put, self._put)
        else:
            entry.value, entry.latest = value, self._put
        self._waiting.set()

    def _done(self) -> int:
        """All that was put up to here is written."""
        return next(iter(self._dirty.values())).since - 1 if self._dirty else self._put

    async def flushed(self, timeout_s: float) -> bool:
        """Whether all that was put so far is written, within `timeout_s`."""
        wanted = self._put
        self._hurry.set()
        try:
            async with asyncio.timeout(timeout_s), self._written:
                await self._written.wait_for(lambda: self._done() >= wanted)
        except TimeoutError:
            return False
        return True

    async def _run(self) -> None:
        pause_s = RETRY_MIN_S
        while True:
            await self._waiting.wait()
            self._waiting.clear()
            while self._dirty:
                if len(self._dirty) < OPERATIONS_MAX:
                    await self._gather()
                if await self._write_some():
                    pause_s = RETRY_MIN_S
                else:
                    await asyncio.sleep(pause_s * (0.5 + random.random()))
                    pause_s = min(2 * pause_s, RETRY_MAX_S)

    async def _gather(self) -> None:
        try:
            async with asyncio.timeout(GATHER_S):
                await self._hurry.wait()
        except TimeoutError:
            return
        self._hurry.clear()

    async def _write_some(self) -> bool:
        batch = {
            key: (entry.value, entry.latest) for key, entry in itertools.islice(self._dirty.items(), OPERATIONS_MAX)
        }
        puts = {key: value for key, (value, _) in batch.items() if value is not None}
        deletes = [key for key, (value, _) in batch.items() if value is None]
        try:
            ours = await self._store.swap(self._guard(), puts=puts, deletes=deletes)
        except StoreError as error:
            log.warning("not written yet", keys=len(self._dirty), error=str(error))
            return False
        except Exception:  # a bug, and no reason to write nothing any more
            log.exception("the journal failed")
            return False
        if not ours:
            self.clear()
            self._on_foreign("the leader's key is not what this reign wrote")
            return True
        self.batches += 1
        self.writes += len(batch)
        for key, (_, latest) in batch.items():
            entry = self._dirty.pop(key, None)
            if entry is not None and entry.latest > latest:  # put again meanwhile
                self._dirty[key] = _Entry(entry.value, latest + 1, entry.latest)
        async with self._written:
            self._written.notify_all()
        return True

"""The fleet's prefix directory: workers publish into it, routers follow it.

A follower first gets everything in pages, then every change in order; one that lags begins anew. So a router that
restarts knows the same as before within one exchange, and a directory that restarts asks its workers for everything.
Event loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field

from tokenrelay.ledger.api import (
    Actor,
    Applied,
    CacheEvent,
    Code,
    Directory,
    DirectoryNotice,
    HolderEnded,
    Holding,
    Rejection,
)
from tokenrelay.ledger.directory import PrefixDirectory

PAGE_HASHES = 4096  # 64 KiB
RESYNC_HASHES_MAX = 1 << 22
FOLLOWER_EVENTS_MAX = 1 << 18  # that one router has not read; 4 MiB of hashes
FOLLOWERS_MAX = 256
_INVALID = Rejection(Code.INVALID, "pages of a resync come in order, from 0")


class _Follower:
    """What waits for one router."""

    def __init__(self) -> None:
        self.notices: list[DirectoryNotice] = []
        self.events = 0  # of `notices`
        self.gap = True
        self.told: set[str] = set()  # workers it knows something of
        self.waiting = asyncio.Event()

    def put(self, notice: DirectoryNotice) -> None:
        if self.gap:
            return
        self.events += 1 + (len(notice.events) if isinstance(notice, Holding) else 0)
        self.notices.append(notice)
        if self.events > FOLLOWER_EVENTS_MAX:
            self.take()
            self.gap = True
        elif isinstance(notice, Holding):
            self.told.add(notice.actor.name)
        self.waiting.set()

    def take(self) -> list[DirectoryNotice]:
        notices, self.notices, self.events = self.notices, [], 0
        return notices


@dataclass(slots=True)
class _Resync:
    """Pages of one resync that came so far."""

    sequence: int
    pages: int = 0
    hashes: list[bytes] = field(default_factory=list)


class DirectoryHost:
    """Implements `Directory` in this process."""

    def __init__(self, directory: PrefixDirectory | None = None) -> None:
        self.directory = directory or PrefixDirectory()
        self.resyncs = 0  # asked for, ever
        self._followers: set[_Follower] = set()
        self._resyncs: dict[Actor, _Resync] = {}

    async def publish(self, actor: Actor, sequence: int, events: Sequence[CacheEvent]) -> Applied | Rejection:
        """See `Directory`."""
        return self.apply(actor, sequence, events)

    async def resync(self, actor: Actor, sequence: int, block_hashes: Sequence[bytes]) -> Rejection | None:
        """See `Directory`."""
        for page, last, hashes in pages_of(block_hashes):
            self.resync_page(actor, sequence, page, last, hashes)
        return None

    def apply(self, actor: Actor, sequence: int, events: Sequence[CacheEvent]) -> Applied:
        """One batch of a worker's events."""
        before = None if self.directory.knows(actor.name) else self.directory.names()
        applied = self.directory.apply(actor.name, actor.incarnation, sequence, events)
        if applied is Applied.APPLIED:
            self._tell(Holding(actor, sequence, tuple(events), replaces=sequence == 1))
        elif applied is Applied.RESYNC:
            self.resyncs += 1
            self._tell(HolderEnded(actor.name))
        for name in () if before is None else before - self.directory.names():
            self._tell(HolderEnded(name))  # made room for a new one
        return applied

    def resync_page(
        self, actor: Actor, sequence: int, page: int, last: bool, hashes: Sequence[bytes]
    ) -> Rejection | None:
        """One page of everything a worker holds; believed when the last one is there."""
        pending = self._resyncs.get(actor)
        if page == 0:
            pending = self._resyncs[actor] = _Resync(sequence)
        if pending is None or (pending.sequence, pending.pages) != (sequence, page):
            self._resyncs.pop(actor, None)
            return _INVALID
        if len(pending.hashes) + len(hashes) > RESYNC_HASHES_MAX:
            del self._resyncs[actor]
            return Rejection(Code.INVALID, f"a worker may hold {RESYNC_HASHES_MAX} blocks at most")
        pending.pages += 1
        pending.hashes += hashes
        if last:
            del self._resyncs[actor]
            self.directory.resync(actor.name, actor.incarnation, sequence, pending.hashes)
            for holding in _holding_pages(actor, sequence, pending.hashes):
                self._tell(holding)
        return None

    def remove(self, name: str) -> None:
        """The worker is gone."""
        self.directory.remove(name)
        for actor in [actor for actor in self._resyncs if actor.name == name]:
            del self._resyncs[actor]
        self._tell(HolderEnded(name))

    def clear(self) -> None:
        """Know nothing: the workers will be asked for everything."""
        for name, *_ in self.directory.holders():
            self.remove(name)

    async def follow(self) -> AsyncIterator[DirectoryNotice]:
        """See `Directory`."""
        async for notices in self.follow_batches():
            for notice in notices:
                yield notice

    async def follow_batches(self) -> AsyncIterator[list[DirectoryNotice]]:
        """Notices that came together, bounded."""
        if len(self._followers) >= FOLLOWERS_MAX:
            return
        follower = _Follower()
        self._followers.add(follower)
        try:
            while True:
                if follower.gap:
                    for batch in self._everything(follower):
                        yield batch
                while follower.notices and not follower.gap:
                    yield follower.take()
                if not follower.notices and not follower.gap:
                    follower.waiting.clear()
                    await follower.waiting.wait()
        finally:
            self._followers.discard(follower)

    def _everything(self, follower: _Follower) -> Iterator[list[DirectoryNotice]]:
        """As of one instant; changes that come while it is sent queue up behind it."""
        follower.take()
        follower.gap = False
        holders = self.directory.holders()
        yield [HolderEnded(name) for name in follower.told - {name for name, *_ in holders}]
        follower.told = {name for name, *_ in holders}
        for name, incarnation, sequence, hashes in holders:
            for page in _holding_pages(Actor(name, incarnation), sequence, hashes):
                yield [page]

    def _tell(self, notice: DirectoryNotice) -> None:
        for follower in self._followers:
            follower.put(notice)


def pages_of(block_hashes: Sequence[bytes]) -> Iterator[tuple[int, bool, Sequence[bytes]]]:
    """(page, last, hashes) of a whole set; at least one page."""
    count = max(1, -(-len(block_hashes) // PAGE_HASHES))
    for page in range(count):
        yield page, page == count - 1, block_hashes[page * PAGE_HASHES : (page + 1) * PAGE_HASHES]


def _holding_pages(actor: Actor, sequence: int, hashes: Sequence[bytes]) -> Iterator[Holding]:
    for page, _, part in pages_of(hashes):
        yield Holding(actor, sequence, [("sealed", block_hash) for block_hash in part], replaces=page == 0)


def apply_notice(directory: PrefixDirectory, notice: DirectoryNotice) -> None:
    """The router's side: bring its own copy up to date."""
    if isinstance(notice, HolderEnded):
        directory.remove(notice.name)
    elif notice.replaces:
        directory.resync(notice.actor.name, notice.actor.incarnation, notice.sequence, ())
        directory.extend(notice.actor.name, notice.actor.incarnation, notice.sequence, notice.events)
    else:
        directory.extend(notice.actor.name, notice.actor.incarnation, notice.sequence, notice.events)


async def follow_into(directory: PrefixDirectory, source: Directory) -> None:
    """Keep a router's copy the same as the fleet's, until cancelled."""
    async for notice in source.follow():
        apply_notice(directory, notice)

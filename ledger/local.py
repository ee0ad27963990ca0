"""The embedded backend: a ledger in this process behind the same protocol as a kvstore's. No server, no lease to lose.

ledger = LocalLedger()
joined = await ledger.join(member, lease_s=10)
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from tokenrelay.ledger.api import (
    Actor,
    Code,
    Event,
    Handle,
    HandleView,
    Joined,
    Member,
    Notice,
    Rejection,
)
from tokenrelay.ledger.host import LedgerHost
from tokenrelay.ledger.notices import NoticeQueue


class LocalLedger:
    """Implements `Ledger` on a host of its own or a given one. Answers at once."""

    def __init__(self, host: LedgerHost | None = None) -> None:
        self.host = host or LedgerHost()

    async def join(self, member: Member, *, lease_s: float) -> Joined | Rejection:
        """See `Ledger`."""
        return self.host.join(member, lease_s)

    async def keepalive(self, actor: Actor) -> Rejection | None:
        """See `Ledger`."""
        return self.host.keepalive(actor)

    async def leave(self, actor: Actor) -> Rejection | None:
        """See `Ledger`."""
        return self.host.leave(actor)

    async def reserve(self, owner: Actor, *, extents: int, deadline_s: float) -> Handle | Rejection:
        """See `Ledger`."""
        return self.host.reserve(owner, extents, deadline_s)

    async def offer(self, handle: Handle, owner: Actor, *, deadline_s: float | None = None) -> Rejection | None:
        """See `Ledger`."""
        return self.host.move(Event.OFFER, handle, owner, deadline_s=deadline_s)

    async def seal(self, handle: Handle, owner: Actor, *, extents: int) -> Rejection | None:
        """See `Ledger`."""
        return self.host.move(Event.SEAL, handle, owner, extents=extents)

    async def claim(self, handle: Handle, claimant: Actor, *, deadline_s: float | None = None) -> Rejection | None:
        """See `Ledger`."""
        return self.host.move(Event.CLAIM, handle, claimant, deadline_s=deadline_s)

    async def transfer(self, handle: Handle, claimant: Actor, *, deadline_s: float | None = None) -> Rejection | None:
        """See `Ledger`."""
        return self.host.move(Event.TRANSFER, handle, claimant, deadline_s=deadline_s)

    async def quarantine(self, handle: Handle, owner: Actor, *, deadline_s: float | None = None) -> Rejection | None:
        """See `Ledger`."""
        return self.host.move(Event.QUARANTINE, handle, owner, deadline_s=deadline_s)

    async def decline(self, handle: Handle, claimant: Actor) -> Rejection | None:
        """See `Ledger`."""
        return self.host.move(Event.DECLINE, handle, claimant)

    async def adopt(self, handle: Handle, claimant: Actor, *, deadline_s: float | None = None) -> Rejection | None:
        """See `Ledger`."""
        return self.host.move(Event.ADOPT, handle, claimant, deadline_s=deadline_s)

    async def release(self, handle: Handle, owner: Actor) -> Rejection | None:
        """See `Ledger`."""
        return self.host.move(Event.RELEASE, handle, owner)

    async def reclaim(self, handle: Handle, owner: Actor) -> Rejection | None:
        """See `Ledger`."""
        return self.host.move(Event.RECLAIM, handle, owner)

    async def fence(self, handle: Handle, owner: Actor) -> Rejection | None:
        """See `Ledger`."""
        return self.host.move(Event.FENCE, handle, owner)

    async def acknowledge(self, handle: Handle, claimant: Actor) -> Rejection | None:
        """See `Ledger`."""
        return self.host.move(Event.ACKNOWLEDGE, handle, claimant)

    async def watch(self, actor: Actor) -> AsyncIterator[Notice]:
        """See `Ledger`."""
        queue = NoticeQueue()
        if self.host.watch(actor, queue) is not None:
            return
        try:
            while True:
                for notice in self.host.drain(actor, queue):
                    yield notice
                if queue.ended:
                    return
                await queue.wait()
        finally:
            self.host.unwatch(actor, queue)

    async def view(self, handle: Handle) -> HandleView | Rejection:
        """See `Ledger`."""
        view = self.host.books.view(handle)
        return self.host.refusal() or view or Rejection(Code.UNKNOWN_HANDLE, "there is no such handle")

    async def views(self, actor: Actor | None = None) -> list[HandleView] | Rejection:
        """See `Ledger`."""
        return self.host.refusal() or self.host.books.views(actor)

    async def members(self) -> list[Member] | Rejection:
        """See `Ledger`."""
        return self.host.refusal() or list(self.host.roster.members())

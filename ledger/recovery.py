"""A kvstore takes over: what its predecessor wrote down, completed by what the members say.

The journal runs behind the decisions, so the successor may find a handle where it was some transitions ago. It decides
nothing until every member of the former reign has attached again, saying what it owns and has claimed, or has let its
lease run out. A member that goes on believes what it was told by the former reign, and its word moves the handle
forward along the table; a handle that its owner does not know any more ends, a claim that its claimant does not know is
declined. A member that does not come back is taken for dead: its owners' peers are told to cut it off.

Members are written down before they are told that they joined, so nobody can hold a claim whom the successor does not
wait for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence

from tokenrelay.base.logging import get_logger
from tokenrelay.ledger.api import Actor, Code, HandleView, Joined, Member, Rejection, State
from tokenrelay.ledger.host import LedgerHost
from tokenrelay.ledger.ledger import EmbeddedLedger
from tokenrelay.ledger.states import PEER_MAY_TOUCH, TERMINAL

log = get_logger("recovery")

# How far a handle's life has come, for comparing what is written with what a member was told.
_PROGRESS = {
    state: place
    for place, state in enumerate(
        (
            State.RESERVED,
            State.OFFERED,
            State.CLAIMED,
            State.TRANSFERRING,
            State.QUARANTINED,
            State.RETURNED,
            State.ADOPTED,
        )
    )
}
CLAIM_LEFT_MIN_S = 1.0  # of a claim whose deadline passed while nobody could act on it


class Recovery:
    """One takeover, from what was read to the first decision. Event loop only."""

    def __init__(
        self,
        host: LedgerHost,
        members: Sequence[tuple[Member, float]],
        handles: Iterable[HandleView],
        on_done: Callable[[list[Actor]], None],
    ) -> None:
        """`members` with their leases; `on_done` is called once with those that did not come back."""
        self._host = host
        self._on_done = on_done
        now_s = asyncio.get_running_loop().time()
        self._waiting = {member.actor: now_s + lease_s for member, lease_s in members}  # until when
        self._timer: asyncio.TimerHandle | None = None
        self.finished = False
        for member, lease_s in members:
            host.roster.add(member, lease_s)
            host.books.join(member.actor)
        host.books.restore(handles)
        log.info("taking over", members=len(self._waiting), handles=host.books.open_count)

    def start(self) -> None:
        """Wait for the members from now on; with none it is over at once."""
        loop = asyncio.get_running_loop()
        if self._timer is not None:
            self._timer.cancel()
        if not self.finished:
            self._timer = loop.call_at(max(self._waiting.values(), default=loop.time()), self._finish)

    def cancel(self) -> None:
        """The reign ended before it began."""
        self.finished = True
        if self._timer is not None:
            self._timer.cancel()

    def attach(self, member: Member, lease_s: float, handles: list[HandleView]) -> Joined | Rejection:
        """A member of the former reign goes on; what it says is merged in."""
        actor = member.actor
        if not self._host.roster.alive(actor):
            return Rejection(Code.STALE_INCARNATION, "this life of the member is over")
        self._host.roster.touch(actor)
        if actor in self._waiting:
            told = {view.handle: view for view in handles}
            for view in handles:
                self._merge(actor, view)
            for view in self._host.books.views(actor):
                if view.handle not in told:
                    self._settle(actor, view)
            del self._waiting[actor]
            self.start()  # for those that are still missing
        return Joined(self._host.term, self._host.roster.lease_s(actor), self._host.hash_key)

    def _merge(self, actor: Actor, told: HandleView) -> None:
        """Bring the handle as far as this party was told that it is."""
        books = self._host.books
        view = books.view(told.handle)
        if view is None or view.state in TERMINAL or told.state not in _PROGRESS or view.state not in _PROGRESS:
            return
        handle, goal = told.handle, _PROGRESS[told.state]
        if view.owner is not None and view.state is State.RESERVED and goal > 0:
            books.offer(handle, view.owner)
        if view.owner == actor:
            if told.sealed > view.sealed:
                books.seal(handle, actor, extents=told.sealed)
            if told.state is State.QUARANTINED and _state(books, told) in PEER_MAY_TOUCH - {State.QUARANTINED}:
                books.quarantine(handle, actor)
        elif told.claimant == actor:
            if _state(books, told) is State.OFFERED and goal >= _PROGRESS[State.CLAIMED]:
                left_s = max(CLAIM_LEFT_MIN_S, told.deadline_left_s)
                log.info("a claim that was not written down", handle=handle, claimant=actor, left_s=left_s)
                books.claim(handle, actor, deadline_s=left_s)
            if _state(books, told) is State.CLAIMED and told.state is State.TRANSFERRING:
                books.transfer(handle, actor)
            if told.state is State.ADOPTED and view.owner is not None:  # it decodes: nobody else may claim this
                books.seal(handle, view.owner, extents=view.extents)
                books.adopt(handle, actor)

    def _settle(self, actor: Actor, view: HandleView) -> None:
        """A party knows nothing of it: it had come to an end there."""
        books, handle = self._host.books, view.handle
        if view.owner == actor:
            if view.state in PEER_MAY_TOUCH:
                books.fence(handle, actor)  # its blocks are back in its pool: whoever claimed them is cut off
            elif view.state is State.ADOPTED:
                books.release(handle, actor)
            else:
                books.reclaim(handle, actor)
        elif view.state is State.QUARANTINED:
            books.acknowledge(handle, actor)
        elif view.state in PEER_MAY_TOUCH:
            books.decline(handle, actor)

    def _finish(self) -> None:
        if not self.finished:
            self.cancel()
            log.info("taken over", missing=len(self._waiting), handles=self._host.books.open_count)
            self._on_done(list(self._waiting))


def _state(books: EmbeddedLedger, view: HandleView) -> State | None:
    return books.state(view.handle)

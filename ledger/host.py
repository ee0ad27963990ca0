"""A ledger with members and watchers, synchronous: what the embedded ledger and the kvstore both run.

It adds to the books (ledger.py) who is alive, who must be told, and a timer that acts: a lease that is over ends the
member's life, a handle past its deadline is announced to who must act (law 3). One event loop; nothing polls.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable

from tokenrelay.base.logging import get_logger
from tokenrelay.ledger.api import (
    Code,
    Duty,
    DutyDue,
    Event,
    Handle,
    HandleChanged,
    HandleView,
    Joined,
    Member,
    MemberEnded,
    MemberJoined,
    Notice,
    Rejection,
    Snapshot,
    Suspended,
)
from tokenrelay.ledger.ledger import HANDLES_MAX, Actor, EmbeddedLedger
from tokenrelay.ledger.members import Roster
from tokenrelay.ledger.notices import NoticeQueue

log = get_logger("ledger")

EXTENTS_MAX = 1 << 24
DEADLINE_MAX_S = 24 * 3600.0
DUTY_AGAIN_FIRST_S, DUTY_AGAIN_MAX_S = 0.5, 30.0  # a duty nobody did is told again after this, doubled each time
AUTHORITY_AGAIN_S = 0.2  # looks again after this while the right to decide is in doubt
HELD_UP_S = 0.25  # a timer that comes later than this, and than a quarter of a lease: nobody could be heard
WATCHERS_MAX = 8192
ENDED_MAX = 65536
_TIMED = frozenset({Event.OFFER, Event.CLAIM, Event.TRANSFER, Event.ADOPT, Event.QUARANTINE})  # may set a deadline
_PLAIN = frozenset({Event.DECLINE, Event.ACKNOWLEDGE, Event.RELEASE, Event.RECLAIM, Event.FENCE})
_DEAD = Rejection(Code.STALE_INCARNATION, "this life of the member is over, or it never joined")


class LedgerHost:
    """The one place where transitions are decided, while it is not suspended."""

    def __init__(
        self,
        *,
        handles_max: int = HANDLES_MAX,
        lease_max_s: float = 60.0,
        answer_s: float = 5.0,
        term: int = 0,
        hash_key: bytes | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.term = term
        self.answer_s = answer_s  # how long a claimant whose claim is over may take to say that it reads no more
        self.hash_key = secrets.token_bytes(16) if hash_key is None else hash_key
        self.lease_max_s = lease_max_s
        self.books = EmbeddedLedger(handles_max=handles_max, clock=clock, term=term, on_change=self._on_change)
        self.roster = Roster(clock=clock)
        self.refusals: Counter[Code] = Counter()
        self.transitions: Counter[Event] = Counter()
        self.on_handle: Callable[[HandleView], None] | None = None  # a journal: called after every change
        self.on_member: Callable[[Member, float], None] | None = None  # a life began, with its lease; 0: it ended
        self.authority: Callable[[], Rejection | None] | None = None  # asked before every decision
        self._handles_max = handles_max
        self._clock = clock
        self._suspended: Rejection | None = None
        self._watchers: dict[Actor, set[NoticeQueue]] = {}
        self._ended: dict[Actor, None] = {}  # lives that are over; the oldest are forgotten
        self._mover: Actor | None = None
        self._announced: dict[Handle, tuple[float, float]] = {}  # duties told: (next time, pause after it)
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at_s = 0.0

    # -- authority ----------------------------------------------------------------------------------------------------
    def refusal(self) -> Rejection | None:
        """Why nothing can be decided now, or None."""
        if self._suspended is not None:
            return self._suspended
        return None if self.authority is None else self.authority()

    def suspend(self, reason: str) -> None:
        """Refuse every transition from now on; nobody's life or deadline ends meanwhile."""
        if self._suspended is None:
            log.warning("transitions are refused", reason=reason)
        self._suspended = Rejection(Code.UNAVAILABLE, reason)
        self._tell_all(Suspended(reason))
        self._cancel_timer()

    def resume(self, term: int) -> None:
        """Decide again, giving names of this term. Everybody could not be heard meanwhile: leases count anew."""
        self._suspended = None
        self.set_term(term)
        self.roster.touch_all()
        for queues in self._watchers.values():
            for queue in queues:
                queue.restart()
        self._arm(0.0)

    def begin_anew(self, term: int, hash_key: bytes) -> None:
        """Forget everything: what another reign decided since is read in next. Suspended until `resume`."""
        self.suspend("taking over from another kvstore")
        for actor in list(self._watchers):
            for queue in self._watchers.pop(actor):
                queue.end(Suspended("taking over from another kvstore"))
        self.hash_key = hash_key
        self.books = EmbeddedLedger(
            handles_max=self._handles_max, clock=self._clock, term=term, on_change=self._on_change
        )
        self.roster = Roster(clock=self._clock)
        self._announced.clear()
        self.term = term

    def end(self, actors: Iterable[Actor], reason: str) -> None:
        """Lives that are over, without anybody having said so."""
        for actor in actors:
            if self.roster.alive(actor):
                self._end(actor, reason, fenced=False)

    def set_term(self, term: int) -> None:
        """Names given from now on carry it."""
        self.term = term
        self.books.set_term(term)

    def close(self) -> None:
        """No timer any more."""
        self._cancel_timer()
        self._suspended = Rejection(Code.UNAVAILABLE, "the ledger is closed")

    # -- members ------------------------------------------------------------------------------------------------------
    def join(self, member: Member, lease_s: float) -> Joined | Rejection:
        """Begin a life, or go on with it: a repeated join of the same life changes nothing."""
        refusal = self.refusal() or self.roster.refuse(member, lease_s) or (_DEAD if self.over(member.actor) else None)
        if refusal is not None:
            return self._count(refusal)
        granted_s = min(lease_s, self.lease_max_s)
        former = self.roster.find(member.name)
        if former is not None and former.actor != member.actor:
            self._end(former.actor, "its name joined again", fenced=False)
        is_new = not self.roster.alive(member.actor)
        self.roster.add(member, granted_s)
        self.books.join(member.actor)
        if is_new:
            log.info("member joined", member=member.name, incarnation=member.incarnation, role=member.role)
            if self.on_member is not None:
                self.on_member(member, granted_s)
            self._tell_all(MemberJoined(member), except_for=member.actor)
        self._arm(granted_s)
        return Joined(self.term, granted_s, self.hash_key)

    def over(self, actor: Actor) -> bool:
        """Whether this life has ended here: it never comes back (law 6)."""
        return actor in self._ended

    def keepalive(self, actor: Actor) -> Rejection | None:
        """The lease counts anew; also while suspended, so that nobody is taken for dead afterwards."""
        if not self.roster.touch(actor):
            return self.refusal() or self._count(_DEAD)
        return self.refusal()

    def leave(self, actor: Actor, reason: str = "it left") -> Rejection | None:
        """End a life in good order: it can touch no memory any more."""
        refusal = self.refusal()
        if refusal is None and not self.roster.alive(actor):
            refusal = _DEAD
        if refusal is not None:
            return self._count(refusal)
        self._end(actor, reason, fenced=True)
        return None

    def _end(self, actor: Actor, reason: str, *, fenced: bool) -> None:
        member = self.roster.remove(actor)
        self._ended[actor] = None
        if len(self._ended) > ENDED_MAX:
            del self._ended[next(iter(self._ended))]
        if self.on_member is not None and member is not None:
            self.on_member(member, 0.0)
        log.info("member ended", member=actor.name, incarnation=actor.incarnation, reason=reason)
        notice = MemberEnded(actor, reason)
        for queue in self._watchers.pop(actor, ()):
            queue.end(notice)
        self._tell_all(notice)  # before the handles': an owner cuts it off, then sees what is over
        self.books.leave(actor, fenced=fenced)
        self._arm(0.0)

    # -- transitions --------------------------------------------------------------------------------------------------
    def reserve(self, owner: Actor, extents: int, deadline_s: float) -> Handle | Rejection:
        """A new handle, or why not."""
        refusal = self.refusal() or _out_of_bounds(extents, deadline_s)
        if refusal is not None:
            return self._count(refusal)
        self._mover = owner
        answer = self.books.reserve(owner, extents=extents, deadline_s=deadline_s)
        self._mover = None
        if isinstance(answer, Rejection):
            return self._count(answer)
        self._arm(deadline_s)
        return answer

    def move(
        self, event: Event, handle: Handle, actor: Actor, *, deadline_s: float | None = None, extents: int = 0
    ) -> Rejection | None:
        """Any event but reserve, by its party: compare and swap. None: it is done."""
        refusal = self.refusal() or _out_of_bounds(extents, 1.0 if deadline_s is None else deadline_s)
        if refusal is None:
            self._mover = actor
            refusal = self._decide(event, handle, actor, deadline_s, extents)
            self._mover = None
        if refusal is not None:
            return self._count(refusal)
        self.transitions[event] += 1
        if deadline_s is not None:
            self._arm(deadline_s)
        return None

    def _decide(
        self, event: Event, handle: Handle, actor: Actor, deadline_s: float | None, extents: int
    ) -> Rejection | None:
        if event is Event.SEAL:
            return self.books.seal(handle, actor, extents=extents)
        transition = getattr(self.books, event.value) if event in _TIMED | _PLAIN else None
        if transition is None:
            return Rejection(Code.NOT_YOURS, f"{event.value} is no event that a member sends")
        answer = transition(handle, actor, deadline_s=deadline_s) if event in _TIMED else transition(handle, actor)
        assert answer is None or isinstance(answer, Rejection)
        return answer

    def _count(self, refusal: Rejection) -> Rejection:
        self.refusals[refusal.code] += 1
        return refusal

    # -- watchers -----------------------------------------------------------------------------------------------------
    def watch(self, actor: Actor, queue: NoticeQueue) -> Rejection | None:
        """Put what concerns `actor` into `queue` from now on."""
        if not self.roster.alive(actor):
            return self.refusal() or self._count(_DEAD)
        if sum(map(len, self._watchers.values())) >= WATCHERS_MAX:
            return self._count(Rejection(Code.FULL, f"there are {WATCHERS_MAX} watchers already"))
        self._watchers.setdefault(actor, set()).add(queue)
        if self._suspended is not None:
            queue.put(Suspended(self._suspended.reason))
        else:
            queue.restart()
        return None

    def unwatch(self, actor: Actor, queue: NoticeQueue) -> None:
        """No more."""
        queues = self._watchers.get(actor)
        if queues is not None:
            queues.discard(queue)
            if not queues:
                del self._watchers[actor]

    def drain(self, actor: Actor, queue: NoticeQueue) -> list[Notice]:
        """What waits in `queue`, with the Snapshot where it has a gap and one can be made."""
        if queue.gap and not queue.ended and self._suspended is None and self.roster.alive(actor):
            queue.take()
            queue.gap = False
            return [Snapshot(self.term, self.roster.members(), tuple(self.books.views(actor)))]
        return queue.take()

    def _on_change(self, view: HandleView) -> None:
        if self.on_handle is not None:
            self.on_handle(view)
        mover = self._mover
        if self._watchers:
            notice = HandleChanged(view)
            for party in {view.owner, view.claimant} - {mover, None}:
                if party is not None:
                    for queue in self._watchers.get(party, ()):
                        queue.put(notice)

    def _tell_all(self, notice: Notice, except_for: Actor | None = None) -> None:
        for actor, queues in self._watchers.items():
            if actor != except_for:
                for queue in queues:
                    queue.put(notice)

    # -- time ---------------------------------------------------------------------------------------------------------
    def _arm(self, within_s: float) -> None:
        """Look at the clock `within_s` seconds from now at the latest."""
        loop = asyncio.get_running_loop()
        at_s = loop.time() + within_s
        if self._timer is not None and self._timer_at_s <= at_s + 0.001:
            return
        self._cancel_timer()
        self._timer_at_s = at_s
        self._timer = loop.call_at(at_s + 0.001, self._act)

    def _cancel_timer(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def _act(self) -> None:
        self._timer = None
        if self._suspended is not None:
            return  # `resume` arms the timer
        if self.refusal() is not None:
            self._arm(AUTHORITY_AGAIN_S)
            return
        late_s = asyncio.get_running_loop().time() - self._timer_at_s
        if late_s > max(
            HELD_UP_S, self.roster.shortest_s() / 4
        ):  # stopped, or starved: what members said meanwhile waits to be read, so that comes first
            log.warning("this process was held up: leases count anew", late_s=round(late_s, 3))
            self.roster.touch_all()
            self._arm(HELD_UP_S)
            return
        for actor in self.roster.lapsed():
            self._end(actor, f"nothing was heard of it for {self.roster.lease_s(actor):g} s", fenced=False)
        waits = [wait for wait in (self.roster.next_end_s(), self._announce_duties()) if wait is not None]
        if waits:
            self._arm(min(waits))

    def _announce_duties(self) -> float | None:
        """Tell who must act on handles past their deadline; seconds until the next look, None: nothing is open."""
        now_s = self._clock()
        for handle, duty in self.books.expired():
            if duty is Duty.EXPIRE:  # its own; the blocks stay until the claimant answers or is cut off
                self.books.expire(handle, deadline_s=self.answer_s)
        due, ahead_s = self.books.due()
        announced, self._announced = self._announced, {}
        waits: list[float] = []
        for handle, duty in due:
            next_s, pause_s = announced.get(handle, (now_s, DUTY_AGAIN_FIRST_S))
            if next_s <= now_s:
                view = self.books.view(handle)
                owner = None if view is None else view.owner
                for queue in self._watchers.get(owner, ()) if owner is not None else ():
                    queue.put(DutyDue(handle, duty))
                log.warning("a handle is past its deadline", handle=handle, duty=duty.value, owner=owner)
                next_s, pause_s = now_s + pause_s, min(2 * pause_s, DUTY_AGAIN_MAX_S)
            self._announced[handle] = (next_s, pause_s)
            waits.append(next_s - now_s)
        if ahead_s is not None:
            waits.append(ahead_s)
        return min(waits, default=None)

    @property
    def duties(self) -> dict[Duty, int]:
        """Handles past their deadline by what is due."""
        return dict(Counter(duty for _, duty in self.books.expired()))


def _out_of_bounds(extents: int, deadline_s: float) -> Rejection | None:
    if not 0 <= extents <= EXTENTS_MAX:
        return Rejection(Code.INVALID, f"extents is {extents}, expected 0 to {EXTENTS_MAX}")
    if not 0 < deadline_s <= DEADLINE_MAX_S:
        return Rejection(Code.INVALID, f"deadline_s is {deadline_s}, expected more than 0, to {DEADLINE_MAX_S:g}")
    return None

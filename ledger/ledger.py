"""The ledger of KV handles: who owns what, who may read it, until when. This is the embedded backend, in memory.

    ledger = EmbeddedLedger()
    ledger.join(prefill), ledger.join(decode)
    handle = ledger.reserve(prefill, extents=24, deadline_s=30)     # a Handle, or why not
    ledger.offer(handle, prefill)
    ledger.claim(handle, decode, deadline_s=10)
    ledger.seal(handle, prefill, extents=24)
    ledger.transfer(handle, decode, deadline_s=10)                  # while it reads; each one renews the lease
    ledger.adopt(handle, decode)
    ledger.release(handle, prefill)

An expected refusal is a value (`Rejection`), never an exception: a stale actor loses, and learns why. An actor is a
member in one of its lives; a member that joins again has died before, and everything its former life held ends then
(law 6). What may follow what is in libscheduler's constexpr table (states.py reads it). The ledger acts on no deadline
itself: `expired` says what is due; `expire` ends a claim and keeps the blocks, `fence` says that a reader was cut off.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from tokenrelay.ledger.states import DUE, PARTIES, PEER_MAY_TOUCH, TABLE, TERMINAL, Event, Party, State

HANDLES_MAX = 65536


class Actor(NamedTuple):
    """A member of the fleet in one of its lives."""

    name: str
    incarnation: str


class Handle(NamedTuple):
    """The serialisable name of a sequence's blocks at its owner. Numbers are reused, with the next generation.

    `term` is the reign of the kvstore that gave the name: two reigns may give the same number and generation, when the
    former one could not write down what it gave. In a process of one's own there is one reign, 0.
    """

    number: int
    generation: int
    term: int = 0


class Code(Enum):
    """Why a transition was refused."""

    FULL = "full"
    UNKNOWN_HANDLE = "unknown_handle"
    STALE_GENERATION = "stale_generation"
    STALE_TERM = "stale_term"
    STALE_INCARNATION = "stale_incarnation"
    NOT_YOURS = "not_yours"
    WRONG_STATE = "wrong_state"
    NOT_SEALED = "not_sealed"
    NOT_DUE = "not_due"  # to expire: its deadline is not over
    INCOMPATIBLE = "incompatible"  # at join: another model, dtype, block size, layout, width or protocol
    INVALID = "invalid"  # a field is out of its bounds
    UNAVAILABLE = "unavailable"  # the kvstore cannot decide just now: nothing changed, or nobody knows whether it did


class Rejection(NamedTuple):
    """An expected refusal."""

    code: Code
    reason: str


class Duty(Enum):
    """What somebody must do about a handle that is past its deadline."""

    RECLAIM = "reclaim"  # the owner: nobody else touches the blocks
    RELEASE = "release"  # the owner
    EXPIRE = "expire"  # whoever keeps the ledger: the claim ends, the blocks stay where they are
    FENCE = "fence"  # the owner cuts the claimant off; a timer alone never takes blocks from a reader


DUTIES = {state: Duty(event.value) for state, (event, _) in DUE.items()}


@dataclass(frozen=True, slots=True)
class HandleView:
    """A handle as it stands, for people, watchers and whoever takes a ledger over."""

    handle: Handle
    state: State
    owner: Actor | None  # None: it is over
    claimant: Actor | None
    extents: int
    sealed: int
    deadline_left_s: float  # below 0: past it


@dataclass(slots=True)
class _Record:
    """One handle number. Between lives (terminal state) it belongs to nobody."""

    generation: int = 0
    term: int = 0
    state: State = State.RELEASED
    owner: Actor | None = None
    claimant: Actor | None = None
    extents: int = 0  # to be sealed before adoption
    sealed: int = 0  # never more than `extents`
    deadline_s: float = 0.0  # on the ledger's clock


_WRONG_STATE = {pair: Rejection(Code.WRONG_STATE, answer) for pair, answer in TABLE.items() if isinstance(answer, str)}
_UNKNOWN = Rejection(Code.UNKNOWN_HANDLE, "there is no such handle")
_STALE = Rejection(Code.STALE_GENERATION, "the handle's number is used by another one now")
_STALE_TERM = Rejection(Code.STALE_TERM, "the handle's name was given under another term")
_DEAD = Rejection(Code.STALE_INCARNATION, "this life of the member is over, or it never joined")
_FOREIGN = Rejection(Code.NOT_YOURS, "the event is for another party")
_UNSEALED = Rejection(Code.NOT_SEALED, "some extents are not sealed yet")
_NOT_DUE = Rejection(Code.NOT_DUE, "the claim's deadline is not over, and its claimant lives")
_HAVE_CLAIMANT = PEER_MAY_TOUCH | {State.ADOPTED}


class EmbeddedLedger:
    """The ledger in this process's memory. One thread (the event loop's); bounded by `handles_max`."""

    def __init__(
        self,
        *,
        handles_max: int = HANDLES_MAX,
        clock: Callable[[], float] = time.monotonic,
        term: int = 0,
        on_change: Callable[[HandleView], None] | None = None,
    ) -> None:
        """`term` goes into the names given; `on_change` sees every handle after a change, its parties still named."""
        self._handles_max = handles_max
        self._term = term
        self._on_change = on_change
        self._clock = clock
        self._records: list[_Record] = []
        self._unused: list[int] = []  # numbers whose handle is over
        self._members: dict[str, Actor] = {}
        self._deadlines: list[tuple[float, int, int]] = []  # heap of (instant, number, generation); may be out of date
        self.counts: dict[State, int] = dict.fromkeys(State, 0)  # handles per state; terminal ones: ever

    def set_term(self, term: int) -> None:
        """Names given from now on carry it."""
        self._term = term

    # -- members ------------------------------------------------------------------------------------------------------
    def join(self, actor: Actor) -> list[Handle]:
        """A member's new life. Its former one is over, but may be running still; returns the handles that moved."""
        former = self._members.get(actor.name)
        ended = self.leave(former, fenced=False) if former is not None and former != actor else []
        self._members[actor.name] = actor
        return ended

    def leave(self, actor: Actor, *, fenced: bool = True) -> list[Handle]:
        """This life is over: it takes part in nothing any more. Returns the handles that moved.

        Its own handles are lost. Its claims are fenced if it cannot touch memory any more (`fenced`: it left in good
        order, or its process was seen to end); otherwise they are quarantined, and their owners cut it off at once.
        """
        if self._members.get(actor.name) != actor:
            return []
        del self._members[actor.name]
        moved = []
        for number, record in enumerate(self._records):
            if record.owner == actor:
                event = Event.LOSE
            elif record.claimant == actor and record.state in PEER_MAY_TOUCH:
                event = Event.FENCE if fenced else Event.EXPIRE
            else:
                continue
            if event is Event.EXPIRE:
                self._set_deadline(number, record, 0.0)  # nobody is there to answer
            if isinstance(TABLE[record.state, event], State):
                moved.append(Handle(number, record.generation, record.term))
                self._move(number, record, event)
        return moved

    # -- transitions --------------------------------------------------------------------------------------------------
    def reserve(self, owner: Actor, *, extents: int, deadline_s: float) -> Handle | Rejection:
        """The owner admitted a sequence whose KV has `extents` parts; to be offered or reclaimed in `deadline_s`."""
        if self._members.get(owner.name) != owner:
            return _DEAD
        if self._unused:
            number = self._unused.pop()
        elif len(self._records) < self._handles_max:
            number = len(self._records)
            self._records.append(_Record())
        else:
            return Rejection(Code.FULL, f"all {self._handles_max} handles are in use")
        record = self._records[number]
        record.generation += 1
        record.term = self._term
        state = TABLE[State.UNUSED, Event.RESERVE]
        assert isinstance(state, State)
        record.state, record.owner, record.claimant = state, owner, None
        record.extents, record.sealed = extents, 0
        self.counts[state] += 1
        self._set_deadline(number, record, deadline_s)
        self._changed(number, record)
        return Handle(number, record.generation, record.term)

    def offer(self, handle: Handle, owner: Actor, *, deadline_s: float | None = None) -> Rejection | None:
        """Claimable from now on."""
        return self._apply(handle, owner, Event.OFFER, deadline_s)

    def seal(self, handle: Handle, owner: Actor, *, extents: int) -> Rejection | None:
        """`extents` of them (counted from the start, not added) can be read now; never fewer than before."""
        return self._apply(handle, owner, Event.SEAL, None, extents)

    def claim(self, handle: Handle, claimant: Actor, *, deadline_s: float | None = None) -> Rejection | None:
        """The claimant has room, and may read what is sealed until the deadline."""
        return self._apply(handle, claimant, Event.CLAIM, deadline_s)

    def transfer(self, handle: Handle, claimant: Actor, *, deadline_s: float | None = None) -> Rejection | None:
        """The claimant has begun to read, or goes on reading: its lease counts anew."""
        return self._apply(handle, claimant, Event.TRANSFER, deadline_s)

    def decline(self, handle: Handle, claimant: Actor) -> Rejection | None:
        """The claimant reads no more and will not adopt. A handle is claimed once: the owner reserves another one."""
        return self._apply(handle, claimant, Event.DECLINE, None)

    def acknowledge(self, handle: Handle, claimant: Actor) -> Rejection | None:
        """The claimant of a quarantined handle reads no more: the owner may reclaim it."""
        return self._apply(handle, claimant, Event.ACKNOWLEDGE, None)

    def adopt(self, handle: Handle, claimant: Actor, *, deadline_s: float | None = None) -> Rejection | None:
        """The claimant read and validated everything: it goes on alone."""
        return self._apply(handle, claimant, Event.ADOPT, deadline_s)

    def release(self, handle: Handle, owner: Actor) -> Rejection | None:
        """The owner gives its pins back after the adoption."""
        return self._apply(handle, owner, Event.RELEASE, None)

    def quarantine(self, handle: Handle, owner: Actor, *, deadline_s: float | None = None) -> Rejection | None:
        """The owner wants its blocks back while somebody may read: the claim ends, and the claimant is to answer."""
        return self._apply(handle, owner, Event.QUARANTINE, deadline_s)

    def expire(self, handle: Handle, *, deadline_s: float | None = None) -> Rejection | None:
        """The claim's deadline is over: it cannot be adopted any more. The blocks stay, `deadline_s` for an answer."""
        return self._apply(handle, None, Event.EXPIRE, deadline_s)

    def reclaim(self, handle: Handle, owner: Actor) -> Rejection | None:
        """The owner takes the blocks back; refused while somebody may read."""
        return self._apply(handle, owner, Event.RECLAIM, None)

    def fence(self, handle: Handle, owner: Actor | None = None) -> Rejection | None:
        """The claimant was cut off from the owner's memory (its registration is gone, its process is dead).

        `owner`: on whose word; None: whoever calls knows it, and answers for it.
        """
        return self._apply(handle, owner, Event.FENCE, None)

    def _apply(
        self, handle: Handle, actor: Actor | None, event: Event, deadline_s: float | None, extents: int = 0
    ) -> Rejection | None:
        number, generation, term = handle
        if not 0 <= number < len(self._records):
            return _UNKNOWN
        record = self._records[number]
        if record.term != term:
            return _STALE_TERM
        if record.generation != generation:
            return _STALE
        if actor is not None and self._members.get(actor.name) != actor:
            return _DEAD
        wrong_state = _WRONG_STATE.get((record.state, event))
        if wrong_state is not None:
            return wrong_state
        party = PARTIES[event]
        if (party is Party.CLAIMANT and actor != record.claimant) or (
            actor != record.owner and (party is Party.OWNER or (party is Party.LEDGER and actor is not None))
        ):
            return _FOREIGN
        if event is Event.ADOPT and record.sealed < record.extents:
            return _UNSEALED
        if event is Event.EXPIRE and not self._overdue(record):
            return _NOT_DUE
        if deadline_s is not None:
            self._set_deadline(number, record, deadline_s)
        if event is Event.SEAL:
            record.sealed = min(record.extents, max(record.sealed, extents))
        elif event is Event.CLAIM:
            record.claimant = actor
        elif event in (Event.DECLINE, Event.ACKNOWLEDGE):
            record.claimant = None
        self._move(number, record, event)
        return None

    def _overdue(self, record: _Record) -> bool:
        claimant = record.claimant
        lives = claimant is not None and self._members.get(claimant.name) == claimant
        return record.deadline_s <= self._clock() or not lives

    def _move(self, number: int, record: _Record, event: Event) -> None:
        state = TABLE[record.state, event]
        assert isinstance(state, State)
        if state is not record.state:
            self.counts[record.state] -= 1
            self.counts[state] += 1
            record.state = state
        self._changed(number, record)
        if state in TERMINAL:
            record.owner = record.claimant = None
            self._unused.append(number)

    def _changed(self, number: int, record: _Record) -> None:
        if self._on_change is not None:
            self._on_change(self._view(number, record))

    def restore(self, views: Iterable[HandleView]) -> None:
        """Open handles of a former term, as they were written down, into books that have none; their members joined.

        Deadlines begin anew with what was left of them. Raises ValueError for a handle that cannot be.
        """
        assert not self._records, "the books are not empty"
        for view in views:
            number, generation, term = view.handle
            if not 0 <= number < self._handles_max or generation < 1 or view.state in TERMINAL or view.owner is None:
                raise ValueError(f"no open handle is written like this: {view}")
            while len(self._records) <= number:
                self._records.append(_Record())
            claimant = view.claimant if view.state in _HAVE_CLAIMANT else None
            record = _Record(generation, term, view.state, view.owner, claimant, view.extents, view.sealed)
            self._records[number] = record
            self.counts[view.state] += 1
            self._set_deadline(number, record, max(0.0, view.deadline_left_s))
        self._unused = [number for number, record in enumerate(self._records) if record.owner is None]

    # -- deadlines ----------------------------------------------------------------------------------------------------
    def next_deadline_s(self) -> float | None:
        """Seconds until the next deadline of an open handle (at least 0), or None."""
        while self._deadlines:
            at_s, number, generation = self._deadlines[0]
            record = self._records[number]
            if record.generation == generation and record.state not in TERMINAL and record.deadline_s == at_s:
                return max(0.0, at_s - self._clock())
            heapq.heappop(self._deadlines)
        return None

    def expired(self) -> list[tuple[Handle, Duty]]:
        """Handles past their deadline and what is due; they stay so until somebody acts."""
        return self.due()[0]

    def due(self) -> tuple[list[tuple[Handle, Duty]], float | None]:
        """`expired()`, and the seconds until the next handle joins them (None: no other is open)."""
        found: list[tuple[Handle, Duty]] = []
        kept: list[tuple[float, int, int]] = []
        while (left_s := self.next_deadline_s()) is not None and left_s == 0.0:
            entry = heapq.heappop(self._deadlines)
            if entry not in kept[-1:]:
                kept.append(entry)
                record = self._records[entry[1]]
                found.append((Handle(entry[1], entry[2], record.term), DUTIES[record.state]))
        for entry in kept:
            heapq.heappush(self._deadlines, entry)
        return found, left_s

    def _set_deadline(self, number: int, record: _Record, deadline_s: float) -> None:
        record.deadline_s = self._clock() + deadline_s
        if len(self._deadlines) > 4 * self._handles_max:
            self._deadlines = [
                (r.deadline_s, n, r.generation) for n, r in enumerate(self._records) if r.state not in TERMINAL
            ]
            heapq.heapify(self._deadlines)
        else:
            heapq.heappush(self._deadlines, (record.deadline_s, number, record.generation))

    # -- views --------------------------------------------------------------------------------------------------------
    def state(self, handle: Handle) -> State | None:
        """Where it is; None when its number is unknown or used by another one."""
        if not 0 <= handle.number < len(self._records):
            return None
        record = self._records[handle.number]
        return record.state if (record.generation, record.term) == handle[1:] else None

    def view(self, handle: Handle) -> HandleView | None:
        """All about it; None when its number is unknown or used by another one."""
        if self.state(handle) is None:
            return None
        return self._view(handle.number, self._records[handle.number])

    def views(self, actor: Actor | None = None) -> list[HandleView]:
        """Every open handle, or those that `actor` owns or claimed."""
        return [
            self._view(number, record)
            for number, record in enumerate(self._records)
            if record.state not in TERMINAL and (actor is None or actor in (record.owner, record.claimant))
        ]

    def _view(self, number: int, record: _Record) -> HandleView:
        return HandleView(
            Handle(number, record.generation, record.term),
            record.state,
            record.owner,
            record.claimant,
            record.extents,
            record.sealed,
            record.deadline_s - self._clock(),
        )

    @property
    def open_count(self) -> int:
        """Handles in a state that is not terminal."""
        return len(self._records) - len(self._unused)

    def check(self) -> None:
        """Raise AssertionError when the books do not balance."""
        states = [record.state for record in self._records]
        for state in State:
            if state not in TERMINAL:
                assert states.count(state) == self.counts[state], f"{state}: counted {self.counts[state]}"
        assert len(set(self._unused)) == len(self._unused), "a number is unused twice"
        for number, record in enumerate(self._records):
            assert (record.state in TERMINAL) == (record.owner is None), f"handle {number} has no owner, or too many"
            assert (record.state in _HAVE_CLAIMANT) == (record.claimant is not None), f"handle {number}"
            assert 0 <= record.sealed <= record.extents
            assert record.state is not State.ADOPTED or record.sealed == record.extents, "adopted before it was sealed"
        open_numbers = {n for n, record in enumerate(self._records) if record.state not in TERMINAL}
        watched = {(n, g) for _, n, g in self._deadlines}
        for number in open_numbers:
            assert (number, self._records[number].generation) in watched, f"handle {number} has no deadline (law 3)"
        assert open_numbers.isdisjoint(self._unused) and len(open_numbers) + len(self._unused) == len(self._records)

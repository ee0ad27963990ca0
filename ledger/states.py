"""The life of a KV handle, as libscheduler's constexpr table has it (handle.hpp), for the ledger.

    Reserved -> Offered -> Claimed -> Transferring -> Adopted -> Released
                              \\-> Quarantined -> Returned -> Reclaimed, or -> Fenced; from anywhere -> Lost

The compiler checked that table: every (state, event) pair is a transition or a rejection with a reason, and the laws of
docs/kv-ownership.md hold for it. Nothing is repeated here but the names.
"""

from __future__ import annotations

from enum import Enum

from tokenrelay.libscheduler import EventFacts, StateFacts, fsm_tables


class State(Enum):
    """Where a handle is. Each state that holds blocks has a deadline, and someone who acts on it (law 3)."""

    UNUSED = "unused"  # the number is nobody's
    RESERVED = "reserved"  # the owner admitted the sequence; nobody else may touch its blocks
    OFFERED = "offered"  # claimable
    CLAIMED = "claimed"  # a claimant has room, and may be reading
    TRANSFERRING = "transferring"  # it reads; what it reports renews its lease
    QUARANTINED = "quarantined"  # the claim is over, but the claimant may be reading until it answers or is fenced
    RETURNED = "returned"  # the claimant said that it reads no more: the owner takes the blocks back
    ADOPTED = "adopted"  # the claimant validated all it read and needs the source no more
    RELEASED = "released"  # terminal: handed over, the owner's pins are given back
    RECLAIMED = "reclaimed"  # terminal: taken back, nobody reads
    FENCED = "fenced"  # terminal: the claimant cannot touch the blocks any more, whatever it believes
    LOST = "lost"  # terminal: the owner's life is over, and the blocks with it


class Event(Enum):
    """What may happen to a handle; PARTIES says whose event it is."""

    RESERVE = "reserve"
    FILL = "fill"  # stays in the owner's process
    SEAL = "seal"  # some more extents can be read
    OFFER = "offer"
    CLAIM = "claim"
    TRANSFER = "transfer"  # it reads, and goes on reading: the lease counts anew
    ADOPT = "adopt"  # it read and validated everything
    DECLINE = "decline"  # it reads no more, and will not adopt
    ACKNOWLEDGE = "acknowledge"  # it was told to stop, and reads no more
    RELEASE = "release"
    QUARANTINE = "quarantine"  # the owner wants its blocks back while somebody may be reading
    EXPIRE = "expire"  # the claim's deadline is over, or its claimant's lease
    RECLAIM = "reclaim"
    FENCE = "fence"  # the claimant is dead, or cut off from the owner's memory
    LOSE = "lose"  # the owner is dead


class Party(Enum):
    """Whose event it is, or who must act."""

    NOBODY = "nobody"
    OWNER = "owner"
    CLAIMANT = "claimant"
    ANYONE = "anyone"  # any member
    LEDGER = "ledger"  # on its own knowledge, or on the owner's word


_table = fsm_tables()["kv_handle"]
INITIAL = State(_table.initial.lower())
TABLE: dict[tuple[State, Event], State | str] = {
    (State(row.state.lower()), Event(row.event.lower())): State(row.next.lower()) if row.next else row.reason
    for row in _table.rows
}
FACTS: dict[State, StateFacts] = {State(name.lower()): facts for name, facts in _table.state_facts.items()}
EVENT_FACTS: dict[Event, EventFacts] = {Event(name.lower()): facts for name, facts in _table.event_facts.items()}
PARTIES: dict[Event, Party] = {event: Party(EVENT_FACTS[event].party) for event in Event}
PEER_MAY_TOUCH = frozenset(state for state in State if FACTS[state].peer_may_touch)
TERMINAL = frozenset(s for s in State if s is not INITIAL and not any(isinstance(TABLE[s, e], State) for e in Event))
# What is due when a state's deadline is over, and who must see to it.
DUE: dict[State, tuple[Event, Party]] = {
    state: (Event(facts.duty.lower()), Party(facts.actor)) for state, facts in FACTS.items() if facts.duty
}

assert set(FACTS) == set(State) and set(EVENT_FACTS) == set(Event), "states.py and handle.hpp name different things"

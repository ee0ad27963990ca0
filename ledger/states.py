"""The life of a KV handle, as data: every (state, event) pair is a transition or a rejection with a reason.

    Reserved -> Offered <-> Claimed -> Adopted -> Released
        \\          \\          \\
         \\----------+---------- Reclaimed / Fenced, and Lost from anywhere when the owner's life is over

A pair that is missing here makes the import fail.
"""

from __future__ import annotations

from enum import Enum


class State(Enum):
    """Where a handle is. Each non-terminal state has a deadline (law 3)."""

    RESERVED = "reserved"  # the owner admitted the sequence; nobody else may touch its blocks
    OFFERED = "offered"  # claimable
    CLAIMED = "claimed"  # a claimant has room, and may be reading
    ADOPTED = "adopted"  # the claimant validated all it read and needs the source no more
    RELEASED = "released"  # terminal: handed over, the owner's pins are given back
    RECLAIMED = "reclaimed"  # terminal: taken back, nobody reads
    FENCED = "fenced"  # terminal: the claimant cannot touch the blocks any more, whatever it believes
    LOST = "lost"  # terminal: the owner's life is over, and the blocks with it


class Event(Enum):
    """What may happen to a handle, and who may cause it."""

    OFFER = "offer"  # owner
    SEAL = "seal"  # owner: some more extents can be read
    CLAIM = "claim"  # any member
    DECLINE = "decline"  # claimant: it stopped reading, and will not adopt
    ADOPT = "adopt"  # claimant: it read and validated everything
    RELEASE = "release"  # owner
    RECLAIM = "reclaim"  # owner
    FENCE = "fence"  # the ledger: the claimant is dead, or cut off from the owner's memory
    LOSE = "lose"  # the ledger: the owner is dead


class Party(Enum):
    """Whose event it is."""

    OWNER = "owner"
    CLAIMANT = "claimant"
    ANYONE = "anyone"
    LEDGER = "ledger"


PARTIES: dict[Event, Party] = {
    Event.OFFER: Party.OWNER,
    Event.SEAL: Party.OWNER,
    Event.CLAIM: Party.ANYONE,
    Event.DECLINE: Party.CLAIMANT,
    Event.ADOPT: Party.CLAIMANT,
    Event.RELEASE: Party.OWNER,
    Event.RECLAIM: Party.OWNER,
    Event.FENCE: Party.LEDGER,
    Event.LOSE: Party.LEDGER,
}

TERMINAL = frozenset({State.RELEASED, State.RECLAIMED, State.FENCED, State.LOST})

_NOT_OFFERED = "the handle is not offered"
_NOT_CLAIMED = "nobody claimed the handle"
_MAY_READ = "the claimant may be reading: it declines, or is fenced"
_OVER = "the handle is over"

_R, _O, _C, _A = State.RESERVED, State.OFFERED, State.CLAIMED, State.ADOPTED
TABLE: dict[tuple[State, Event], State | str] = {
    (_R, Event.OFFER): _O,
    (_R, Event.SEAL): _R,
    (_R, Event.CLAIM): _NOT_OFFERED,
    (_R, Event.DECLINE): _NOT_CLAIMED,
    (_R, Event.ADOPT): _NOT_CLAIMED,
    (_R, Event.RELEASE): "nothing was handed over: it is reclaimed",
    (_R, Event.RECLAIM): State.RECLAIMED,
    (_R, Event.FENCE): _NOT_CLAIMED,
    (_R, Event.LOSE): State.LOST,
    (_O, Event.OFFER): "the handle is offered already",
    (_O, Event.SEAL): _O,
    (_O, Event.CLAIM): _C,
    (_O, Event.DECLINE): _NOT_CLAIMED,
    (_O, Event.ADOPT): _NOT_CLAIMED,
    (_O, Event.RELEASE): "nothing was handed over: it is reclaimed",
    (_O, Event.RECLAIM): State.RECLAIMED,
    (_O, Event.FENCE): _NOT_CLAIMED,
    (_O, Event.LOSE): State.LOST,
    (_C, Event.OFFER): "the handle is claimed already",
    (_C, Event.SEAL): _C,
    (_C, Event.CLAIM): "another one claimed the handle",
    (_C, Event.DECLINE): _O,
    (_C, Event.ADOPT): _A,
    (_C, Event.RELEASE): _MAY_READ,
    (_C, Event.RECLAIM): _MAY_READ,
    (_C, Event.FENCE): State.FENCED,
    (_C, Event.LOSE): State.LOST,
    (_A, Event.OFFER): "the handle was adopted",
    (_A, Event.SEAL): "an adopted handle has every extent",
    (_A, Event.CLAIM): "the handle was adopted",
    (_A, Event.DECLINE): "the handle was adopted",
    (_A, Event.ADOPT): "the handle was adopted already",
    (_A, Event.RELEASE): State.RELEASED,
    (_A, Event.RECLAIM): "it was handed over: it is released",
    (_A, Event.FENCE): "nobody reads an adopted handle",
    (_A, Event.LOSE): State.LOST,
    **{(state, event): _OVER for state in TERMINAL for event in Event},
}

_missing = [(s, e) for s in State for e in Event if (s, e) not in TABLE]
assert not _missing, f"pairs nobody thought of: {_missing}"

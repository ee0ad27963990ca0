"""A new reign: what was written down, moved forward by what the members were told (the model's interviews)."""

from __future__ import annotations

from tokenrelay.ledger.api import Actor, Handle, HandleView, Member, State
from tokenrelay.ledger.host import LedgerHost
from tokenrelay.ledger.recovery import Recovery

PREFILL = Member(name="prefill", incarnation="p1", role="prefill")
DECODE, OTHER = (Member(name=name, incarnation="1", role="decode") for name in ("decode", "other"))
HANDLE = Handle(0, 3, 1)


def view(state: State, *, sealed: int, claimant: Actor | None = None) -> HandleView:
    return HandleView(HANDLE, state, PREFILL.actor, claimant, 2, sealed, 30.0)


async def test_an_adoption_that_was_not_written_down_still_counts() -> None:
    """Else another peer could claim the handle, and decode the same request again."""
    host = LedgerHost(term=2)
    missing: list[list[Actor]] = []
    written = view(State.OFFERED, sealed=1)
    recovery = Recovery(host, [(m, 30.0) for m in (PREFILL, DECODE, OTHER)], [written], missing.append)
    recovery.start()
    recovery.attach(DECODE, 30.0, [view(State.ADOPTED, sealed=2, claimant=DECODE.actor)])
    recovery.attach(PREFILL, 30.0, [view(State.CLAIMED, sealed=2, claimant=DECODE.actor)])
    assert not missing, "it waits for everybody"
    recovery.attach(OTHER, 30.0, [])
    recovery.cancel()
    after = host.books.view(HANDLE)
    assert after is not None and (after.state, after.claimant) == (State.ADOPTED, DECODE.actor)
    assert host.books.claim(HANDLE, OTHER.actor) is not None
    assert host.books.release(HANDLE, PREFILL.actor) is None
    host.books.check()

"""The ledger against a model of its own: written by hand from docs/kv-ownership.md, and not from the table.

Random members join, die and come back under the same name; random events come from whoever, alive or dead, about
handles open or over; deadlines pass. Each answer is predicted; the laws are asserted on what a reader may still do.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tokenrelay.ledger.ledger import Actor, Code, Duty, EmbeddedLedger, Handle, Rejection

# state: event -> next state. What is not here is refused.
LIFE = {
    "reserved": {"seal": "reserved", "offer": "offered", "reclaim": "reclaimed"},
    "offered": {"seal": "offered", "claim": "claimed", "reclaim": "reclaimed"},
    "claimed": {
        "seal": "claimed",
        "transfer": "transferring",
        "adopt": "adopted",
        "decline": "returned",
        "quarantine": "quarantined",
        "expire": "quarantined",
        "fence": "fenced",
    },
    "transferring": {
        "seal": "transferring",
        "transfer": "transferring",
        "adopt": "adopted",
        "decline": "returned",
        "quarantine": "quarantined",
        "expire": "quarantined",
        "fence": "fenced",
    },
    "quarantined": {"decline": "returned", "acknowledge": "returned", "fence": "fenced"},
    "returned": {"reclaim": "reclaimed"},
    "adopted": {"release": "released"},
}
BY_OWNER = ("seal", "offer", "release", "reclaim", "quarantine")
BY_CLAIMANT = ("transfer", "adopt", "decline", "acknowledge")
DUE = {
    "reserved": Duty.RECLAIM,
    "offered": Duty.RECLAIM,
    "claimed": Duty.EXPIRE,
    "transferring": Duty.EXPIRE,
    "quarantined": Duty.FENCE,
    "returned": Duty.RECLAIM,
    "adopted": Duty.RELEASE,
}
EXTENTS = 2


@dataclass
class Shadow:
    """A handle as the model has it."""

    owner: Actor
    state: str
    deadline_s: float
    claimant: Actor | None = None
    sealed: int = 0
    readers: set[Actor] = field(default_factory=set)  # who may be reading, whatever anybody believes
    ends: int = 0


@settings(max_examples=100, stateful_step_count=60, deadline=None)
class LedgerAgainstModel(RuleBasedStateMachine):
    """One rule for each kind of event; a refusal must change nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 50.0
        self.ledger = EmbeddedLedger(handles_max=3, clock=lambda: self.now_s, term=7)
        self.live: dict[str, Actor] = {}
        self.actors: list[Actor] = []
        self.handles: dict[Handle, Shadow] = {}

    # -- members ------------------------------------------------------------------------------------------------------
    def _end(self, actor: Actor, *, fenced: bool) -> None:
        for shadow in self.handles.values():
            if shadow.state in LIFE and shadow.owner == actor:
                shadow.readers.clear()  # the memory is gone
                self._enter(shadow, "lost")
            elif shadow.claimant == actor and shadow.state in ("claimed", "transferring", "quarantined"):
                if fenced:
                    shadow.readers.discard(actor)
                    self._enter(shadow, "fenced")
                else:
                    shadow.deadline_s = self.now_s
                    self._enter(shadow, "quarantined")

    def _enter(self, shadow: Shadow, state: str) -> None:
        shadow.state = state
        if state in ("released", "reclaimed", "fenced", "lost"):
            shadow.ends += 1
            assert not shadow.readers, "law 2: its owner uses the blocks again, and somebody may be reading"
            assert shadow.ends == 1, "law 5: a handle ends once"

    @rule(name=st.sampled_from(["a", "b", "c"]))
    def join(self, name: str) -> None:
        actor = Actor(name, str(len(self.actors)))
        if name in self.live:
            self._end(self.live[name], fenced=False)
        self.live[name] = actor
        self.actors.append(actor)
        self.ledger.join(actor)

    @precondition(lambda self: self.actors)
    @rule(data=st.data(), fenced=st.booleans())
    def die(self, data: st.DataObject, fenced: bool) -> None:
        claimants = [shadow.claimant for shadow in self.handles.values() if shadow.state in LIFE and shadow.claimant]
        actor = data.draw(st.sampled_from([*claimants, *self.actors]))
        before = {handle: shadow.state for handle, shadow in self.handles.items()}
        if self.live.get(actor.name) == actor:
            self._end(actor, fenced=fenced)
            del self.live[actor.name]
        moved = self.ledger.leave(actor, fenced=fenced)
        assert set(moved) == {handle for handle, shadow in self.handles.items() if shadow.state != before[handle]}

    # -- handles ------------------------------------------------------------------------------------------------------
    @precondition(lambda self: self.actors)
    @rule(data=st.data(), deadline_s=st.floats(0.5, 5))
    def reserve(self, data: st.DataObject, deadline_s: float) -> None:
        owner = data.draw(st.sampled_from([*self.live.values(), *self.actors]))
        answer = self.ledger.reserve(owner, extents=EXTENTS, deadline_s=deadline_s)
        if self.live.get(owner.name) != owner:
            assert isinstance(answer, Rejection) and answer.code is Code.STALE_INCARNATION
        elif sum(shadow.state in LIFE for shadow in self.handles.values()) == 3:
            assert isinstance(answer, Rejection) and answer.code is Code.FULL
        else:
            assert isinstance(answer, Handle) and answer not in self.handles and answer.term == 7
            self.handles[answer] = Shadow(owner, "reserved", self.now_s + deadline_s)

    def _refusal(self, handle: Handle, shadow: Shadow, actor: Actor | None, event: str) -> Code | None:
        """Why the event must be refused."""
        newest = max(other.generation for other in self.handles if other.number == handle.number)
        if newest != handle.generation:
            return Code.STALE_GENERATION
        if actor is not None and self.live.get(actor.name) != actor:
            return Code.STALE_INCARNATION  # law 6
        if event not in LIFE.get(shadow.state, {}):
            return Code.WRONG_STATE
        if (event in BY_OWNER and actor != shadow.owner) or (event in BY_CLAIMANT and actor != shadow.claimant):
            return Code.NOT_YOURS
        if event == "adopt" and shadow.sealed < EXTENTS:
            return Code.NOT_SEALED
        claimant = shadow.claimant
        if event == "expire" and shadow.deadline_s > self.now_s:
            return None if claimant is not None and self.live.get(claimant.name) != claimant else Code.NOT_DUE
        return None

    @precondition(lambda self: self.handles)
    @rule(data=st.data(), event=st.sampled_from([*BY_OWNER, *BY_CLAIMANT, "claim", "expire", "fence"]))
    def send(self, data: st.DataObject, event: str) -> None:
        """Any event, about any handle, from anybody."""
        self._send(
            data, data.draw(st.sampled_from(sorted(self.handles))), data.draw(st.sampled_from(self.actors)), event
        )

    @precondition(lambda self: any(shadow.state in LIFE for shadow in self.handles.values()))
    @rule(data=st.data())
    def go_on(self, data: st.DataObject) -> None:
        """Events that the states allow, from whose they are, so that a handle gets somewhere."""
        for _ in range(data.draw(st.integers(1, 5))):
            opened = [handle for handle, shadow in self.handles.items() if shadow.state in LIFE]
            if not opened:
                return
            handle = data.draw(st.sampled_from(opened))
            shadow = self.handles[handle]
            event = data.draw(st.sampled_from(sorted(LIFE[shadow.state])))
            actor = shadow.owner if event in BY_OWNER else shadow.claimant if event in BY_CLAIMANT else None
            peers = [live for live in self.live.values() if live != shadow.owner]
            self._send(data, handle, actor or data.draw(st.sampled_from(peers or self.actors)), event)

    def _send(self, data: st.DataObject, handle: Handle, sender: Actor, event: str) -> None:
        shadow = self.handles[handle]
        actor = None if event in ("expire", "fence") else sender
        deadline_s = data.draw(st.none() | st.floats(0.5, 5))
        expected = self._refusal(handle, shadow, actor, event)
        timed = event in ("offer", "claim", "transfer", "adopt", "quarantine", "expire")
        options = {"deadline_s": deadline_s} if timed else {"extents": EXTENTS} if event == "seal" else {}
        before = self.ledger.view(handle)
        answer = getattr(self.ledger, event)(handle, *([] if actor is None else [actor]), **options)
        assert (answer.code if answer is not None else None) is expected, (event, shadow, answer)
        if expected is not None:
            assert self.ledger.view(handle) == before, "a refusal changes nothing"
            return
        self._accept(shadow, actor, event)
        if timed and deadline_s is not None:
            shadow.deadline_s = self.now_s + deadline_s

    def _accept(self, shadow: Shadow, actor: Actor | None, event: str) -> None:
        if event == "claim":
            assert actor is not None
            shadow.claimant = actor
            shadow.readers.add(actor)
        elif event == "seal":
            shadow.sealed = EXTENTS
        elif event in ("adopt", "decline", "acknowledge"):
            assert actor is not None
            shadow.readers.discard(actor)  # it says so itself
        elif event == "fence":
            shadow.readers.clear()  # whoever says Fence has cut them off
        self._enter(shadow, LIFE[shadow.state][event])

    @rule(seconds=st.floats(0.1, 3))
    def time_passes(self, seconds: float) -> None:
        before = {handle: self.ledger.state(handle) for handle in self.handles}
        self.now_s += seconds
        due = dict(self.ledger.expired())
        wanted = {
            handle: DUE[shadow.state]
            for handle, shadow in self.handles.items()
            if shadow.state in LIFE and shadow.deadline_s <= self.now_s
        }
        assert due == wanted, "law 3: who must act, and nobody else"
        assert before == {handle: self.ledger.state(handle) for handle in self.handles}, "a clock changes nothing"

    # -- laws ---------------------------------------------------------------------------------------------------------
    @invariant()
    def both_agree(self) -> None:
        self.ledger.check()
        for handle, shadow in self.handles.items():
            state = self.ledger.state(handle)
            if state is None:
                assert shadow.state not in LIFE, "only what is over gives its number away"
                continue
            assert state.value == shadow.state
            view = self.ledger.view(handle)
            assert view is not None and (shadow.state not in LIFE or view.owner == shadow.owner)
            if shadow.readers:
                assert shadow.state in ("claimed", "transferring", "quarantined"), "law 2"
        opened = [shadow for shadow in self.handles.values() if shadow.state in LIFE]
        assert self.ledger.open_count == len(opened)
        if opened:
            left_s = self.ledger.next_deadline_s()
            soonest_s = max(0.0, min(shadow.deadline_s for shadow in opened) - self.now_s)
            assert left_s == pytest.approx(soonest_s), "law 3"

    def teardown(self) -> None:
        """Law 5: when everybody does what is due, everything ends, once."""
        for _ in range(3):  # a claim: expire, fence
            self.now_s += 100
            for handle, duty in self.ledger.expired():
                shadow = self.handles[handle]
                actor = None if duty in (Duty.EXPIRE, Duty.FENCE) else shadow.owner
                assert getattr(self.ledger, duty.value)(handle, *([] if actor is None else [actor])) is None
                self._accept(shadow, actor, duty.value)
        assert self.ledger.open_count == 0
        assert all(shadow.ends == 1 and not shadow.readers for shadow in self.handles.values())


TestLedgerAgainstModel = LedgerAgainstModel.TestCase

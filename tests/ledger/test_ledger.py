"""The ledger of KV handles: the handover as a transcript, refusals, deadlines, and random runs against the laws."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from tokenrelay.ledger.ledger import DUTIES, Actor, Code, Duty, EmbeddedLedger, Handle, Rejection
from tokenrelay.ledger.states import PARTIES, PEER_MAY_TOUCH, TABLE, TERMINAL, Event, Party, State

PREFILL, DECODE = Actor("prefill", "p1"), Actor("decode", "d1")


class Clock:
    """Seconds, set by hand."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def new_ledger(clock: Clock | None = None, handles_max: int = 64) -> EmbeddedLedger:
    ledger = EmbeddedLedger(handles_max=handles_max, clock=clock or Clock())
    assert ledger.join(PREFILL) == [] and ledger.join(DECODE) == []
    return ledger


def reserve(ledger: EmbeddedLedger, owner: Actor = PREFILL, extents: int = 2, deadline_s: float = 10) -> Handle:
    handle = ledger.reserve(owner, extents=extents, deadline_s=deadline_s)
    assert isinstance(handle, Handle)
    return handle


def code(answer: Rejection | Handle | None) -> Code | None:
    return answer.code if isinstance(answer, Rejection) else None


def test_every_pair_is_listed_and_every_state_can_end() -> None:
    assert len(TABLE) == len(State) * len(Event)
    reachable = {state: {n for (s, _), n in TABLE.items() if s is state and isinstance(n, State)} for state in State}
    for state in State:
        assert (state in TERMINAL) == (not reachable[state])
        if state not in TERMINAL and state is not State.UNUSED:
            assert State.LOST in reachable[state], "a dead owner ends every handle"
    assert {State.RELEASED, State.RECLAIMED, State.FENCED, State.LOST} == TERMINAL
    assert {State.CLAIMED, State.TRANSFERRING, State.QUARANTINED} == PEER_MAY_TOUCH
    assert set(DUTIES) == set(State) - TERMINAL - {State.UNUSED}


def test_a_handover_walks_through_all_states() -> None:
    ledger = new_ledger()
    handle = reserve(ledger)
    assert ledger.offer(handle, PREFILL) is None
    assert ledger.claim(handle, DECODE) is None
    assert ledger.seal(handle, PREFILL, extents=1) is None
    assert ledger.transfer(handle, DECODE) is None and ledger.transfer(handle, DECODE) is None
    assert code(ledger.adopt(handle, DECODE)) is Code.NOT_SEALED
    assert code(ledger.release(handle, PREFILL)) is Code.WRONG_STATE  # a reader may live (law 2)
    assert code(ledger.reclaim(handle, PREFILL)) is Code.WRONG_STATE
    assert ledger.seal(handle, PREFILL, extents=2) is None
    assert ledger.adopt(handle, DECODE) is None
    assert ledger.release(handle, PREFILL) is None
    assert ledger.state(handle) is State.RELEASED and ledger.open_count == 0
    ledger.check()


def test_a_claimant_that_declines_frees_the_owner() -> None:
    ledger = new_ledger()
    handle = reserve(ledger)
    ledger.offer(handle, PREFILL)
    ledger.claim(handle, DECODE)
    assert code(ledger.decline(handle, PREFILL)) is Code.NOT_YOURS
    assert ledger.decline(handle, DECODE) is None
    assert ledger.state(handle) is State.RETURNED
    assert code(ledger.adopt(handle, DECODE)) is Code.WRONG_STATE
    assert code(ledger.claim(handle, DECODE)) is Code.WRONG_STATE, "a handle is claimed once"
    assert ledger.reclaim(handle, PREFILL) is None
    assert ledger.state(handle) is State.RECLAIMED


def test_one_claimant_wins_and_others_learn_why() -> None:
    ledger = new_ledger()
    other = Actor("decode-2", "d2")
    ledger.join(other)
    handle = reserve(ledger)
    assert code(ledger.claim(handle, DECODE)) is Code.WRONG_STATE  # not offered yet
    ledger.offer(handle, PREFILL)
    assert ledger.claim(handle, DECODE) is None
    assert code(ledger.claim(handle, other)) is Code.WRONG_STATE
    assert code(ledger.adopt(handle, other)) is Code.NOT_YOURS


def test_a_reused_number_has_a_new_generation_and_the_stale_name_loses() -> None:
    ledger = new_ledger(handles_max=1)
    old = reserve(ledger)
    assert code(ledger.reserve(PREFILL, extents=1, deadline_s=1)) is Code.FULL
    ledger.offer(old, PREFILL)
    ledger.reclaim(old, PREFILL)
    new = reserve(ledger)
    assert new.number == old.number and new.generation == old.generation + 1
    ledger.offer(new, PREFILL)
    assert code(ledger.claim(old, DECODE)) is Code.STALE_GENERATION
    assert ledger.state(old) is None and ledger.state(new) is State.OFFERED
    assert code(ledger.offer(Handle(7, 1), PREFILL)) is Code.UNKNOWN_HANDLE


def test_a_member_that_joins_again_died_before() -> None:
    ledger = new_ledger()
    owned, claimed = reserve(ledger, DECODE), reserve(ledger)
    ledger.offer(claimed, PREFILL)
    ledger.claim(claimed, DECODE)
    reborn = Actor("decode", "d2")
    assert set(ledger.join(reborn)) == {owned, claimed}
    assert ledger.state(owned) is State.LOST and ledger.state(claimed) is State.QUARANTINED
    assert code(ledger.reclaim(claimed, PREFILL)) is Code.WRONG_STATE, "the former life may be reading"
    assert dict(ledger.expired()) == {claimed: Duty.FENCE}, "nobody is there to answer: the owner cuts it off at once"
    assert code(ledger.adopt(claimed, DECODE)) is Code.STALE_INCARNATION
    assert code(ledger.reserve(DECODE, extents=1, deadline_s=1)) is Code.STALE_INCARNATION
    assert code(ledger.acknowledge(claimed, reborn)) is Code.NOT_YOURS, "a new life does not speak for the former one"
    assert code(ledger.fence(claimed, reborn)) is Code.NOT_YOURS
    assert ledger.fence(claimed, PREFILL) is None and ledger.state(claimed) is State.FENCED
    assert isinstance(ledger.reserve(reborn, extents=1, deadline_s=1), Handle)
    ledger.check()


def test_who_leaves_in_good_order_is_fenced() -> None:
    ledger = new_ledger()
    owned, claimed = reserve(ledger, DECODE), reserve(ledger)
    ledger.offer(claimed, PREFILL)
    ledger.claim(claimed, DECODE)
    assert set(ledger.leave(DECODE)) == {owned, claimed}
    assert ledger.state(owned) is State.LOST and ledger.state(claimed) is State.FENCED
    assert ledger.leave(DECODE) == []
    ledger.check()


def test_a_quarantine_ends_by_an_answer_or_by_a_fence_and_by_nothing_else() -> None:
    clock = Clock()
    ledger = new_ledger(clock)
    answered, declined, fenced, unread = (reserve(ledger, deadline_s=5) for _ in range(4))
    assert code(ledger.quarantine(unread, PREFILL)) is Code.WRONG_STATE  # nobody reads: it is reclaimed
    for handle in (answered, declined, fenced):
        ledger.offer(handle, PREFILL)
        ledger.claim(handle, DECODE)
        ledger.seal(handle, PREFILL, extents=2)
        assert code(ledger.acknowledge(handle, DECODE)) is Code.WRONG_STATE  # nobody asked
        assert code(ledger.quarantine(handle, DECODE)) is Code.NOT_YOURS
        assert ledger.quarantine(handle, PREFILL, deadline_s=3) is None
        assert code(ledger.adopt(handle, DECODE)) is Code.WRONG_STATE, "the claim is over"
        assert code(ledger.transfer(handle, DECODE)) is Code.WRONG_STATE
    clock.now_s += 100
    for handle in (answered, declined, fenced):
        assert code(ledger.reclaim(handle, PREFILL)) is Code.WRONG_STATE, "no clock frees what is read"
        assert dict(ledger.expired())[handle] is Duty.FENCE
    assert ledger.acknowledge(answered, DECODE) is None
    assert ledger.decline(declined, DECODE) is None  # it crossed the quarantine on its way
    for handle in (answered, declined):
        assert ledger.state(handle) is State.RETURNED and ledger.reclaim(handle, PREFILL) is None
    assert ledger.fence(fenced, PREFILL) is None and ledger.state(fenced) is State.FENCED
    ledger.check()


def test_a_claim_expires_when_it_is_overdue_and_progress_renews_it() -> None:
    clock = Clock()
    ledger = new_ledger(clock)
    handle = reserve(ledger)
    ledger.offer(handle, PREFILL)
    ledger.claim(handle, DECODE, deadline_s=2)
    assert code(ledger.expire(handle)) is Code.NOT_DUE
    for _ in range(5):  # a slow pull
        clock.now_s += 1.5
        assert ledger.transfer(handle, DECODE, deadline_s=2) is None
    assert code(ledger.expire(handle)) is Code.NOT_DUE and ledger.state(handle) is State.TRANSFERRING
    clock.now_s += 2.5
    assert dict(ledger.expired()) == {handle: Duty.EXPIRE}
    assert ledger.expire(handle, deadline_s=4) is None and ledger.state(handle) is State.QUARANTINED
    assert ledger.expired() == [] and ledger.next_deadline_s() == pytest.approx(4)
    assert code(ledger.adopt(handle, DECODE)) is Code.WRONG_STATE


def test_deadlines_name_the_duty_and_a_timer_takes_nothing_from_a_reader() -> None:
    clock = Clock()
    ledger = new_ledger(clock)
    reserved, offered, claimed, adopted = (reserve(ledger, deadline_s=5) for _ in range(4))
    for handle in (offered, claimed, adopted):
        ledger.offer(handle, PREFILL)
    for handle in (claimed, adopted):
        ledger.claim(handle, DECODE, deadline_s=7)
    ledger.seal(adopted, PREFILL, extents=2)
    ledger.adopt(adopted, DECODE, deadline_s=1)
    assert ledger.next_deadline_s() == pytest.approx(1)
    clock.now_s += 6
    due = dict(ledger.expired())
    assert due == {reserved: Duty.RECLAIM, offered: Duty.RECLAIM, adopted: Duty.RELEASE}
    clock.now_s += 2
    assert dict(ledger.expired())[claimed] is Duty.EXPIRE
    assert ledger.state(claimed) is State.CLAIMED, "nothing happened by itself"
    assert ledger.fence(claimed) is None
    assert code(ledger.adopt(claimed, DECODE)) is Code.WRONG_STATE


_NO_MESSAGE = (Event.RESERVE, Event.FILL)  # it answers with a name; it stays in the owner's process


@settings(max_examples=60, stateful_step_count=60, deadline=None)
class LedgerMachine(RuleBasedStateMachine):
    """Random actors, live and dead, on random handles, live and stale."""

    handles: Bundle[Handle] = Bundle("handles")
    actors: Bundle[Actor] = Bundle("actors")

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.ledger = EmbeddedLedger(handles_max=4, clock=self.clock)
        self.live: dict[str, Actor] = {}
        self.lives = 0
        self.generations: dict[int, int] = {}
        self.every: set[Handle] = set()

    @rule(target=actors, name=st.sampled_from(["a", "b", "c"]))
    def join(self, name: str) -> Actor:
        self.lives += 1
        actor = Actor(name, str(self.lives))
        for ended in self.ledger.join(actor):
            assert self.ledger.state(ended) in (*TERMINAL, State.QUARANTINED)
        self.live[name] = actor
        return actor

    @rule(actor=consumes(actors))
    def leave(self, actor: Actor) -> None:
        self.ledger.leave(actor)
        if self.live.get(actor.name) == actor:
            del self.live[actor.name]

    @rule(target=handles, owner=actors, extents=st.integers(0, 2), deadline_s=st.floats(0.1, 5))
    def reserve(self, owner: Actor, extents: int, deadline_s: float) -> object:
        answer = self.ledger.reserve(owner, extents=extents, deadline_s=deadline_s)
        if isinstance(answer, Rejection):
            expected = Code.FULL if self.live.get(owner.name) == owner else Code.STALE_INCARNATION
            assert answer.code is expected
            return multiple()
        assert answer.generation == self.generations.get(answer.number, 0) + 1
        self.generations[answer.number] = answer.generation
        self.every.add(answer)
        return answer

    @rule(
        handle=handles,
        actor=actors,
        event=st.sampled_from([e for e in Event if PARTIES[e] is not Party.LEDGER and e not in _NO_MESSAGE]),
        amount=st.integers(0, 3),
    )
    def send(self, handle: Handle, actor: Actor, event: Event, amount: int) -> None:
        before = self.ledger.state(handle)
        occupant = Handle(handle.number, self.generations[handle.number])
        occupant_before = self.ledger.state(occupant)
        answer = (
            self.ledger.seal(handle, actor, extents=amount)
            if event is Event.SEAL
            else getattr(self.ledger, event.value)(handle, actor)
        )
        if occupant != handle:
            assert code(answer) is Code.STALE_GENERATION and self.ledger.state(occupant) is occupant_before
        elif self.live.get(actor.name) != actor:
            assert code(answer) is Code.STALE_INCARNATION and self.ledger.state(handle) is before
        elif answer is not None:
            assert self.ledger.state(handle) is before, "a refusal changes nothing"
        else:
            assert before is not None and self.ledger.state(handle) is TABLE[before, event]

    @rule(seconds=st.floats(0.1, 4))
    def time_passes(self, seconds: float) -> None:
        self.clock.now_s += seconds

    @rule()
    def duties_are_done(self) -> None:
        self.clock.now_s += 100
        for handle, duty in self.ledger.expired():
            record = self.ledger._records[handle.number]
            owner = record.owner
            assert owner is not None
            if duty is Duty.EXPIRE:
                assert self.ledger.expire(handle) is None
                assert self.ledger.fence(handle, owner) is None
            elif duty is Duty.FENCE:
                assert self.ledger.fence(handle, owner) is None
            elif duty is Duty.RECLAIM:
                assert self.ledger.reclaim(handle, owner) is None
            else:
                assert self.ledger.release(handle, owner) is None
        assert self.ledger.open_count == 0, "deadlines and duties end everything"

    @invariant()
    def books_balance(self) -> None:
        self.ledger.check()

    def teardown(self) -> None:
        self.duties_are_done()
        for handle in self.every:
            assert self.ledger.state(handle) in (*TERMINAL, None)


TestLedgerMachine = LedgerMachine.TestCase

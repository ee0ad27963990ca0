"""What every ledger does, wherever it runs: the same tests on each backend."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
from kv_fleet import Fleet, Watcher, member, named

from tokenrelay.ledger.api import (
    Actor,
    Code,
    Duty,
    DutyDue,
    Handle,
    HandleChanged,
    HandleView,
    Joined,
    MemberEnded,
    MemberJoined,
    Rejection,
    Snapshot,
    State,
)
from tokenrelay.ledger.states import TERMINAL

PREFILL, DECODE = member("prefill", role="prefill"), member("decode")


def code(answer: object) -> Code | None:
    return answer.code if isinstance(answer, Rejection) else None


async def joined(fleet: Fleet) -> tuple:  # type: ignore[type-arg]
    """A prefill and a decode process, each with a client of its own."""
    prefill, decode = await fleet.client(), await fleet.client()
    for ledger, who in ((prefill, PREFILL), (decode, DECODE)):
        answer = await ledger.join(who, lease_s=30)
        assert isinstance(answer, Joined) and answer.lease_s == 30 and len(answer.hash_key) == 16
    return prefill, decode


async def test_a_handover_walks_through_its_states_and_both_sides_are_told(fleet: Fleet) -> None:
    prefill, decode = await joined(fleet)
    watching = {who.name: Watcher(ledger, who) for ledger, who in ((prefill, PREFILL), (decode, DECODE))}
    for watcher in watching.values():
        await watcher.until(lambda n: isinstance(n, Snapshot) and len(n.members) == 2 and not n.handles)
    handle = named(await prefill.reserve(PREFILL.actor, extents=2, deadline_s=30))
    assert await prefill.offer(handle, PREFILL.actor) is None
    assert await decode.claim(handle, DECODE.actor, deadline_s=20) is None
    await watching["prefill"].until(lambda n: isinstance(n, HandleChanged) and n.view.claimant == DECODE.actor)
    assert await decode.transfer(handle, DECODE.actor, deadline_s=20) is None
    assert await prefill.seal(handle, PREFILL.actor, extents=1) is None
    await watching["decode"].until(lambda n: isinstance(n, HandleChanged) and n.view.sealed == 1)
    assert code(await decode.adopt(handle, DECODE.actor)) is Code.NOT_SEALED
    assert code(await prefill.release(handle, PREFILL.actor)) is Code.WRONG_STATE
    assert code(await prefill.reclaim(handle, PREFILL.actor)) is Code.WRONG_STATE
    assert await prefill.seal(handle, PREFILL.actor, extents=2) is None
    view = await decode.view(handle)
    assert isinstance(view, HandleView) and (view.sealed, view.extents, view.owner) == (2, 2, PREFILL.actor)
    assert 19 < view.deadline_left_s <= 20.01
    assert await decode.adopt(handle, DECODE.actor) is None
    await watching["prefill"].until(lambda n: isinstance(n, HandleChanged) and n.view.state is State.ADOPTED)
    assert await prefill.release(handle, PREFILL.actor) is None
    last = await watching["decode"].until(lambda n: isinstance(n, HandleChanged) and n.view.state in TERMINAL)
    assert isinstance(last, HandleChanged) and last.view.state is State.RELEASED
    assert await prefill.views() == []


async def test_stale_forged_and_foreign_names_lose(fleet: Fleet) -> None:
    prefill, decode = await joined(fleet)
    old = named(await prefill.reserve(PREFILL.actor, extents=1, deadline_s=30))
    assert await prefill.reclaim(old, PREFILL.actor) is None
    new = named(await prefill.reserve(PREFILL.actor, extents=1, deadline_s=30))
    assert await prefill.offer(new, PREFILL.actor) is None
    assert new.number == old.number and new.generation == old.generation + 1
    assert code(await decode.claim(old, DECODE.actor)) is Code.STALE_GENERATION
    for forged, expected in (
        (new._replace(generation=new.generation + 1), Code.STALE_GENERATION),
        (new._replace(term=new.term + 1), Code.STALE_TERM),
        (new._replace(number=4_000_000_000), Code.UNKNOWN_HANDLE),
    ):
        assert code(await decode.claim(forged, DECODE.actor)) is expected
        assert code(await decode.view(forged)) is Code.UNKNOWN_HANDLE
    assert code(await decode.offer(new, DECODE.actor)) is Code.WRONG_STATE
    assert code(await decode.reclaim(new, DECODE.actor)) is Code.NOT_YOURS
    assert code(await decode.claim(new, Actor("decode", "9"))) is Code.STALE_INCARNATION
    assert code(await decode.claim(new, Actor("nobody", "1"))) is Code.STALE_INCARNATION
    assert code(await prefill.reserve(Actor("nobody", "1"), extents=1, deadline_s=1)) is Code.STALE_INCARNATION
    assert code(await prefill.reserve(PREFILL.actor, extents=1 << 30, deadline_s=1)) is Code.INVALID
    assert code(await prefill.reserve(PREFILL.actor, extents=1, deadline_s=0)) is Code.INVALID
    assert code(await prefill.reserve(PREFILL.actor, extents=-1, deadline_s=1)) is Code.INVALID
    assert code(await prefill.reserve(PREFILL.actor, extents=1, deadline_s=1e9)) is Code.INVALID
    assert [view.handle for view in await prefill.views()] == [new]  # type: ignore[union-attr]


async def test_one_claimant_wins_among_many(fleet: Fleet) -> None:
    prefill, decode = await joined(fleet)
    others = [member(f"decode-{number}") for number in range(5)]
    for other in others:
        assert isinstance(await decode.join(other, lease_s=30), Joined)
    handle = named(await prefill.reserve(PREFILL.actor, extents=1, deadline_s=30))
    await prefill.offer(handle, PREFILL.actor)
    answers = await asyncio.gather(*(decode.claim(handle, other.actor) for other in others))
    assert sorted(map(code, answers), key=str) == [None] + [Code.WRONG_STATE] * 4 or answers.count(None) == 1
    assert answers.count(None) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_identity", b"x" * 16),
        ("dtype", "float32"),
        ("block_tokens", 16),
        ("layout", "gqa 8x128"),
        ("width", 2),
        ("protocol", 9),
    ],
)
async def test_members_that_do_not_fit_are_refused_with_both_named(fleet: Fleet, field: str, value: object) -> None:
    prefill, _ = await joined(fleet)
    stranger = dataclasses.replace(member("stranger"), **{field: value})
    answer = await prefill.join(stranger, lease_s=10)
    assert isinstance(answer, Rejection) and answer.code is Code.INCOMPATIBLE
    assert "stranger" in answer.reason and "prefill" in answer.reason and field in answer.reason
    assert len(await prefill.members()) == 2  # type: ignore[arg-type]
    router = member("router", role="router", model_identity=b"", dtype="", block_tokens=0, layout="")
    assert isinstance(await prefill.join(router, lease_s=10), Joined), "who holds no KV pairs with everybody"


async def test_bad_members_are_refused_by_field(fleet: Fleet) -> None:
    ledger = await fleet.client()
    for bad, lease_s, word in (
        (member(""), 10, "name"),
        (member("a", role="chief"), 10, "role"),
        (member("a", model_identity=b"short"), 10, "model_identity"),
        (member("a" * 600), 10, "name"),
        (member("a"), 1e6, "lease_s"),
    ):
        answer = await ledger.join(bad, lease_s=lease_s)
        assert isinstance(answer, Rejection) and answer.code is Code.INVALID and word in answer.reason


async def test_a_lease_that_is_over_ends_the_life_and_everything_it_held(fleet: Fleet) -> None:
    prefill, decode = await joined(fleet)
    brief = member("brief")
    assert isinstance(await decode.join(brief, lease_s=0.4), Joined)
    watcher, own = Watcher(prefill, PREFILL), Watcher(decode, brief)
    await watcher.until(lambda n: isinstance(n, Snapshot))
    await own.until(lambda n: isinstance(n, Snapshot))
    handle = named(await prefill.reserve(PREFILL.actor, extents=1, deadline_s=30))
    await prefill.offer(handle, PREFILL.actor)
    owned = named(await decode.reserve(brief.actor, extents=1, deadline_s=30))
    assert await decode.claim(handle, brief.actor, deadline_s=30) is None
    for _ in range(4):  # twice as long as the lease
        await asyncio.sleep(0.2)
        assert await decode.keepalive(brief.actor) is None
    ended = await watcher.until(lambda n: isinstance(n, MemberEnded), timeout_s=3)
    assert isinstance(ended, MemberEnded) and ended.actor == brief.actor and "0.4 s" in ended.reason
    changed = await watcher.until(lambda n: isinstance(n, HandleChanged) and n.view.state is not State.CLAIMED)
    assert watcher.notices.index(ended) < watcher.notices.index(changed), "cut it off first"
    await asyncio.wait_for(own.ended.wait(), 3)
    assert code(await decode.keepalive(brief.actor)) is Code.STALE_INCARNATION
    assert code(await decode.adopt(handle, brief.actor)) is Code.STALE_INCARNATION
    assert owned not in [view.handle for view in await prefill.views()]  # type: ignore[union-attr]
    assert code(await decode.join(brief, lease_s=5)) is Code.STALE_INCARNATION, "a life that ended never comes back"
    assert isinstance(await decode.join(member("brief", "2"), lease_s=5), Joined)


async def test_a_second_life_ends_the_first(fleet: Fleet) -> None:
    prefill, decode = await joined(fleet)
    watcher = Watcher(prefill, PREFILL)
    await watcher.until(lambda n: isinstance(n, Snapshot))
    handle = named(await decode.reserve(DECODE.actor, extents=1, deadline_s=30))
    reborn = member("decode", "2")
    other = await fleet.client()
    assert isinstance(await other.join(reborn, lease_s=30), Joined)
    await watcher.until(lambda n: isinstance(n, MemberEnded) and n.actor == DECODE.actor)
    await watcher.until(lambda n: isinstance(n, MemberJoined) and n.member == reborn)
    assert code(await decode.offer(handle, DECODE.actor)) in (Code.STALE_INCARNATION, Code.WRONG_STATE)
    assert code(await decode.leave(DECODE.actor)) is Code.STALE_INCARNATION, "the old life cannot end the new one"
    assert sorted(one.name for one in await other.members()) == ["decode", "prefill"]  # type: ignore[union-attr]


async def test_who_leaves_is_told_of(fleet: Fleet) -> None:
    prefill, decode = await joined(fleet)
    watcher, own = Watcher(prefill, PREFILL), Watcher(decode, DECODE)
    await watcher.until(lambda n: isinstance(n, Snapshot))
    await own.until(lambda n: isinstance(n, Snapshot))
    assert await decode.leave(DECODE.actor) is None
    ended = await watcher.until(lambda n: isinstance(n, MemberEnded))
    assert isinstance(ended, MemberEnded) and ended.actor == DECODE.actor
    await asyncio.wait_for(own.ended.wait(), 3)


async def test_duties_are_told_until_somebody_acts_and_a_timer_takes_nothing(fleet: Fleet) -> None:
    prefill, decode = await joined(fleet)
    watcher = Watcher(prefill, PREFILL)
    await watcher.until(lambda n: isinstance(n, Snapshot))
    unclaimed = named(await prefill.reserve(PREFILL.actor, extents=1, deadline_s=0.2))
    claimed = named(await prefill.reserve(PREFILL.actor, extents=1, deadline_s=0.2))
    await prefill.offer(claimed, PREFILL.actor)
    assert await decode.claim(claimed, DECODE.actor, deadline_s=0.3) is None
    await watcher.until(lambda n: n == DutyDue(unclaimed, Duty.RECLAIM))
    await watcher.until(lambda n: isinstance(n, DutyDue) and n.handle == claimed and n.duty is Duty.FENCE)
    assert code(await prefill.reclaim(claimed, PREFILL.actor)) is Code.WRONG_STATE
    told = len([n for n in watcher.notices if isinstance(n, DutyDue)])
    # again, as nobody acted
    await watcher.until(lambda _: len([n for n in watcher.notices if isinstance(n, DutyDue)]) > told)
    assert code(await decode.fence(claimed, DECODE.actor)) is Code.NOT_YOURS
    assert await prefill.fence(claimed, PREFILL.actor) is None
    assert await prefill.reclaim(unclaimed, PREFILL.actor) is None
    assert code(await decode.adopt(claimed, DECODE.actor)) is Code.WRONG_STATE
    assert await prefill.views() == []


async def test_a_claimant_that_is_told_to_stop_answers_or_is_cut_off(fleet: Fleet) -> None:
    prefill, decode = await joined(fleet)
    watcher = Watcher(decode, DECODE)
    await watcher.until(lambda n: isinstance(n, Snapshot))
    answered, silent = [named(await prefill.reserve(PREFILL.actor, extents=1, deadline_s=30)) for _ in range(2)]
    for handle in (answered, silent):
        await prefill.offer(handle, PREFILL.actor)
        assert await decode.claim(handle, DECODE.actor) is None
        assert await prefill.quarantine(handle, PREFILL.actor, deadline_s=30) is None
        assert code(await prefill.reclaim(handle, PREFILL.actor)) is Code.WRONG_STATE
    await watcher.until(lambda n: isinstance(n, HandleChanged) and n.view.state is State.QUARANTINED)
    assert code(await decode.adopt(answered, DECODE.actor)) is Code.WRONG_STATE
    assert await decode.acknowledge(answered, DECODE.actor) is None
    assert await prefill.reclaim(answered, PREFILL.actor) is None
    assert await prefill.fence(silent, PREFILL.actor) is None
    assert await prefill.views() == []


async def test_many_handles_at_once_keep_the_books(fleet: Fleet) -> None:
    prefill, decode = await joined(fleet)

    async def one(number: int) -> Handle:
        handle = named(await prefill.reserve(PREFILL.actor, extents=2, deadline_s=30))
        assert await prefill.offer(handle, PREFILL.actor) is None
        assert await decode.claim(handle, DECODE.actor, deadline_s=30) is None
        assert await prefill.seal(handle, PREFILL.actor, extents=2) is None
        if number % 3:
            assert await decode.adopt(handle, DECODE.actor) is None
            assert await prefill.release(handle, PREFILL.actor) is None
        return handle

    handles = await asyncio.gather(*(one(number) for number in range(90)))
    open_ones = {view.handle for view in await prefill.views()}  # type: ignore[union-attr]
    assert open_ones == {handle for number, handle in enumerate(handles) if not number % 3}
    if fleet.local is not None:
        fleet.local.host.books.check()
    for service in fleet.services:
        service.store.host.books.check()

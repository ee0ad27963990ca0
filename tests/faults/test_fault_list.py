"""The faults that real systems met (docs/faults.md), at the level of two workers' roles: one test a case.

Each is run as the code is, and again without the guard against it: the same checks must fail then.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from guards import fault
from mesh import BLOCK_TOKENS, Mesh, prompt_of, until
from pretend_device import text_of

from tokenrelay.base.deadlines import Deadline
from tokenrelay.base.errors import TransferFailed, Unavailable
from tokenrelay.ledger import ledger as books
from tokenrelay.ledger.api import Event, State
from tokenrelay.proto import worker_pb2
from tokenrelay.runtime.handover import HandleEvent, Room
from tokenrelay.services.decode.destination import Destination
from tokenrelay.services.prefill.export import Export
from tokenrelay.services.prefill.fences import Fences
from tokenrelay.services.prefill.source import Source
from tokenrelay.transfer.transport import Connection, Transport

PROMPT = prompt_of(100)  # 7 blocks, the last one partial
OTHER = prompt_of(190, 2)  # 12 blocks
TOKENS = 8


async def _nothing(*_: object, **__: object) -> None:
    """In place of what was taken away."""


# -- 1 ----------------------------------------------------------------------------------------------------------------
def the_pins_of_the_handle(patch: pytest.MonkeyPatch) -> None:
    complete = Source._complete

    async def and_give_back(self: Source, export: Export, token: int) -> None:
        await complete(self, export, token)
        self._engine.handover.move(export.sequence_id, HandleEvent.LOSE)

    patch.setattr(Source, "_complete", and_give_back)


@fault(the_pins_of_the_handle)
async def test_01_a_producer_does_not_reuse_blocks_while_a_reference_is_read() -> None:
    """The source has ended its leg and needs the room for somebody else; a slow reader still gets what it was told."""
    async with Mesh(prefill_blocks=16) as mesh:
        mesh.wire.hold()
        relayed = await mesh.relay(PROMPT, TOKENS)
        await until(lambda: relayed.source.terminals)
        other = mesh.prefill.submit(OTHER, TOKENS)
        await asyncio.sleep(0.2)
        mesh.wire.open.set()
        assert await mesh.right_or_error(relayed, PROMPT, TOKENS), relayed.destination
        await until(lambda: other.terminals)
        assert other.token_ids == text_of(OTHER, TOKENS)
        await mesh.settles()


def the_validation_after_the_read(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Connection, "validate", _nothing)


@fault(the_validation_after_the_read)
async def test_01_what_was_read_from_reused_blocks_reaches_nobody() -> None:
    """An owner that gives its blocks to somebody else all the same: no token leaves that rests on them (law 4)."""
    async with Mesh(prefill_blocks=16) as mesh:
        mesh.wire.hold()
        relayed = await mesh.relay(PROMPT, TOKENS)
        await until(lambda: relayed.source.terminals)
        mesh.prefill.engine.handover.move(relayed.source.id, HandleEvent.LOSE)
        other = mesh.prefill.submit(OTHER, TOKENS)
        await until(lambda: other.terminals)
        mesh.wire.open.set()
        assert not await mesh.right_or_error(relayed, PROMPT, TOKENS)
        assert relayed.destination is not None and not relayed.destination.token_ids
        assert "reused" in relayed.destination.terminals[0].error
        await mesh.settles()


# -- 2 ----------------------------------------------------------------------------------------------------------------
def the_renewals(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Destination, "_renew", _nothing)


@fault(the_renewals)
async def test_02_a_lease_does_not_expire_during_a_slow_pull() -> None:
    async with Mesh(claim_s=0.3) as mesh:

        async def slowly() -> None:
            await asyncio.sleep(0.4)

        mesh.wire.before_read = slowly
        relayed = await mesh.relay(PROMPT, TOKENS)
        assert await mesh.right_or_error(relayed, PROMPT, TOKENS), relayed.destination
        await mesh.settles()


def the_quarantine_of_an_expired_claim(patch: pytest.MonkeyPatch) -> None:
    """And with it the owner's own cutting off of whoever was told of the blocks, which would do without."""
    for state in (State.CLAIMED, State.TRANSFERRING):
        patch.setitem(books.TABLE, (state, Event.EXPIRE), State.RECLAIMED)

    async def believed(*_: object) -> None:
        pass

    patch.setattr(Fences, "exclude", believed)


def the_cutting_off_before_the_fence(patch: pytest.MonkeyPatch) -> None:
    async def believed(*_: object) -> bool:
        return True

    patch.setattr(Fences, "cut", believed)


@fault(the_quarantine_of_an_expired_claim, the_cutting_off_before_the_fence)
async def test_02_a_lease_that_expires_during_a_pull_takes_no_block_from_the_reader() -> None:
    """Renewals are lost and the claim is over, the read is not: the blocks stay until it has ended (laws 2 and 3)."""
    async with Mesh(claim_s=0.3, answer_s=0.1, prefill_blocks=16) as mesh:
        mesh.wire.hold()
        mesh.decode.ledger.hold("transfer")
        relayed = await mesh.relay(PROMPT, TOKENS)
        await mesh.wire.waiting.wait()
        await until(lambda: not mesh.host.books.views() or mesh.host.books.views()[0].state is State.QUARANTINED)
        other = mesh.prefill.submit(OTHER, TOKENS)
        await asyncio.sleep(1.0)  # past the answer's deadline, too: the source is asked to cut the reader off
        assert not other.token_ids, "the blocks went to somebody else while they are read"
        mesh.wire.open.set()
        assert not await mesh.right_or_error(relayed, PROMPT, TOKENS)
        await until(lambda: other.terminals)
        assert other.token_ids == text_of(OTHER, TOKENS)
        await mesh.settles()


# -- 3 ----------------------------------------------------------------------------------------------------------------
def the_wait_for_what_still_writes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Connection, "settled", _nothing)


@fault(the_wait_for_what_still_writes)
async def test_03_an_abort_at_the_destination_keeps_the_blocks_that_a_transfer_writes() -> None:
    """The next request there gets the blocks when the transfer has ended, and its text is its own."""
    async with Mesh(decode_blocks=16) as mesh:
        mesh.wire.hold()
        relayed = await mesh.relay(PROMPT, TOKENS)
        await mesh.wire.waiting.wait()
        await until(lambda: relayed.source.terminals)
        mesh.decode.device.hold = lambda plan: bool(plan.decodes)
        assert relayed.destination is not None
        mesh.decode.abort(relayed.destination)
        await until(lambda: relayed.destination.terminals)
        other = mesh.decode.submit(OTHER, TOKENS)
        await asyncio.to_thread(mesh.decode.device.holding.wait, 0.5)  # its prompt is computed, if it got the room
        mesh.wire.open.set()
        await asyncio.sleep(0.1)
        mesh.decode.device.go()
        await until(lambda: other.terminals)
        assert other.token_ids == text_of(OTHER, TOKENS)
        await mesh.settles()


# -- 4 ----------------------------------------------------------------------------------------------------------------
def what_the_ledger_tells_a_claimant(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Destination, "_on_state", lambda *_: None)


@fault(what_the_ledger_tells_a_claimant)
async def test_04_blocks_of_a_destination_whose_source_is_lost_come_back() -> None:
    """The source hangs in the middle of the prompt, so no connection breaks; the ledger declares it dead."""
    async with Mesh() as mesh:
        mesh.prefill.device.hold = lambda plan: int(plan.starts[0]) >= 3 * BLOCK_TOKENS
        relayed = await mesh.relay(PROMPT, TOKENS)
        assert relayed.destination is not None
        await until(mesh.prefill.device.holding.is_set)
        await until(lambda: mesh.host.books.views()[0].state is State.TRANSFERRING)
        mesh.host.end([mesh.prefill.member.actor], "nothing was heard of it")
        await until(lambda: relayed.destination.terminals)
        assert "the source is gone" in relayed.destination.terminals[0].error
        await mesh.settles(mesh.decode)


def the_end_of_the_stream(patch: pytest.MonkeyPatch) -> None:
    follow = Destination._follow

    async def for_ever(self: Destination, *given: Any) -> Any:
        try:
            async for progress in follow(self, *given):
                yield progress
        except Unavailable:
            await asyncio.sleep(3600)

    patch.setattr(Destination, "_follow", for_ever)


@fault(the_end_of_the_stream)
async def test_04_blocks_of_a_destination_whose_source_was_killed_come_back_at_once() -> None:
    """Long before its lease is over: the stream of its progress broke."""
    async with Mesh() as mesh:
        mesh.prefill.device.hold = lambda plan: int(plan.starts[0]) >= 3 * BLOCK_TOKENS
        relayed = await mesh.relay(PROMPT, TOKENS)
        assert relayed.destination is not None
        await until(mesh.prefill.device.holding.is_set)
        await until(lambda: mesh.host.books.views()[0].state is State.TRANSFERRING)
        await mesh.prefill.die()
        await until(lambda: relayed.destination.terminals)
        await until(lambda: mesh.decode.held == (0,) * 6)
        mesh.host.end([mesh.dead[0].member.actor], "its lease ran out")
        await mesh.settles(mesh.decode)


# -- 5 ----------------------------------------------------------------------------------------------------------------
def what_the_source_does_at_a_deadline(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Source, "_act", _nothing)


@fault(what_the_source_does_at_a_deadline)
async def test_05_a_destination_that_refuses_strands_no_block_at_the_source() -> None:
    """Nobody tells the source: its own deadline ends the handle, as nobody can have read."""
    async with Mesh(handle_s=0.4) as mesh:
        await asyncio.to_thread(mesh.decode.engine.drain, Deadline.after(0))
        relayed = await mesh.relay(PROMPT, TOKENS)
        assert relayed.destination is not None
        assert relayed.destination.terminals[0].finish == worker_pb2.FINISH_REJECTED
        await until(lambda: relayed.source.terminals)
        assert mesh.prefill.held[0] > 0
        await mesh.settles()


# -- 6 ----------------------------------------------------------------------------------------------------------------
def the_end_of_an_aborted_handle(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Source, "_take_back", _nothing)


@fault(the_end_of_an_aborted_handle)
async def test_06_a_cancel_during_the_last_step_of_the_prompt() -> None:
    """One terminal reply for each leg, whatever the step still brings, and nothing is left."""
    async with Mesh() as mesh:
        for handed_over in (True, False):
            mesh.prefill.device.hold = lambda plan: bool(plan.samples[0])
            relayed = await mesh.relay(PROMPT, TOKENS) if handed_over else mesh.begin(PROMPT, TOKENS)
            await until(mesh.prefill.device.holding.is_set)
            mesh.prefill.abort(relayed.source)
            mesh.prefill.device.go()
            await mesh.ends(relayed)
            assert relayed.source.terminals[0].finish == worker_pb2.FINISH_ABORT
            assert not relayed.token_ids
            await mesh.settles()
        again = await mesh.relay(PROMPT, TOKENS)
        assert await mesh.right_or_error(again, PROMPT, TOKENS)


@pytest.mark.parametrize("done", [False, True], ids=["undecided", "decided"])
@pytest.mark.parametrize("call", ["claim", "adopt"])
async def test_06_a_cancel_while_the_ledger_decides(call: str, done: bool) -> None:
    """Whether the ledger did it or not: the claimant finds out, and nothing is left."""
    async with Mesh() as mesh:
        ledger = mesh.decode.ledger
        held = ledger.hold_answer(call) if done else ledger.hold(call)
        relayed = await mesh.relay(PROMPT, TOKENS)
        await until(lambda: relayed.source.terminals)
        await asyncio.sleep(0.05)
        assert relayed.destination is not None
        mesh.decode.abort(relayed.destination)
        held.set()
        await mesh.ends(relayed)
        mesh.prefill.abort(relayed.source)  # as its router does: its deadline is far away
        await mesh.settles()


# -- 7 ----------------------------------------------------------------------------------------------------------------
def the_failure_of_a_broken_pull(patch: pytest.MonkeyPatch) -> None:
    pull = Connection.pull

    async def quietly(self: Connection, *given: Any) -> None:
        try:
            await pull(self, *given)
        except TransferFailed:
            self._broken = None

    patch.setattr(Connection, "pull", quietly)


@fault(the_failure_of_a_broken_pull)
async def test_07_a_disconnect_in_mid_transfer() -> None:
    """Half of the KV is here: nothing of it is used, both sides are clean, and the next request finds a connection."""
    async with Mesh() as mesh:
        mesh.wire.hold()
        relayed = await mesh.relay(PROMPT, TOKENS)
        await mesh.wire.waiting.wait()
        for reader in list(mesh.prefill.transport.readers):
            reader.disconnect()
        mesh.wire.open.set()
        assert not await mesh.right_or_error(relayed, PROMPT, TOKENS)
        await mesh.settles()
        again = await mesh.relay(PROMPT, TOKENS)
        assert await mesh.right_or_error(again, PROMPT, TOKENS)
        await mesh.settles()


# -- 8 ----------------------------------------------------------------------------------------------------------------
@fault(the_end_of_an_aborted_handle)
async def test_08_an_abort_of_the_source_is_told_to_the_destination() -> None:
    async with Mesh() as mesh:
        mesh.prefill.device.hold = lambda plan: int(plan.starts[0]) >= 3 * BLOCK_TOKENS
        relayed = await mesh.relay(PROMPT, TOKENS)
        assert relayed.destination is not None
        await until(mesh.prefill.device.holding.is_set)
        await until(lambda: mesh.host.books.views()[0].state is State.TRANSFERRING)
        mesh.prefill.abort(relayed.source)
        await mesh.ends(relayed)
        assert "aborted" in relayed.destination.terminals[0].error
        mesh.prefill.device.go()
        await mesh.settles()


# -- 10, 11 -----------------------------------------------------------------------------------------------------------
def the_room_before_the_claim(patch: pytest.MonkeyPatch) -> None:
    wait = Destination._wait

    async def at_once(self: Destination, entry: Any, awaitable: Any, what: str) -> Any:
        if what == "room in the pool":
            return Room(entry.sequence_id, 0, tuple(range(7)))
        return await wait(self, entry, awaitable, what)

    patch.setattr(Destination, "_wait", at_once)


@fault(the_room_before_the_claim)
async def test_10_a_full_decode_pool_when_the_prompt_is_done_already() -> None:
    """The KV waits where it is, unclaimed; whoever fills the pool is not touched; then both get their texts."""
    async with Mesh(decode_blocks=12) as mesh:
        occupant = mesh.decode.submit(prompt_of(6 * BLOCK_TOKENS, 3), 2 * TOKENS)
        mesh.decode.device.hold = lambda plan: bool(plan.decodes)
        await until(mesh.decode.device.holding.is_set)
        relayed = await mesh.relay(PROMPT, TOKENS)
        await until(lambda: relayed.source.terminals)
        await asyncio.sleep(0.2)
        assert [view.state for view in mesh.host.books.views()] == [State.OFFERED]
        mesh.decode.device.go()
        await until(lambda: occupant.terminals)
        assert occupant.token_ids == text_of(prompt_of(6 * BLOCK_TOKENS, 3), 2 * TOKENS)
        assert await mesh.right_or_error(relayed, PROMPT, TOKENS)
        await mesh.settles()


def what_the_source_says_last(patch: pytest.MonkeyPatch) -> None:
    async def quietly(self: Source, export: Export, reason: str) -> None:
        if await self._ledger.reclaim(export.handle, self._actor) is not None:
            await self._ledger.quarantine(export.handle, self._actor)

    patch.setattr(Source, "_take_back", quietly)


@fault(what_the_source_says_last)
async def test_11_the_error_of_one_leg_is_the_other_ones_too() -> None:
    """At once and in its own words, long before any deadline of the other leg."""
    async with Mesh() as mesh:
        mesh.prefill.device.hold = lambda plan: int(plan.starts[0]) >= 3 * BLOCK_TOKENS
        relayed = await mesh.relay(PROMPT, TOKENS)
        assert relayed.destination is not None
        await until(mesh.prefill.device.holding.is_set)
        await until(lambda: mesh.host.books.views()[0].state is State.TRANSFERRING)
        mesh.prefill.device.fail = RuntimeError("the device caught fire")
        mesh.prefill.device.go()
        await mesh.ends(relayed)
        for stream in (relayed.source, relayed.destination):
            assert "the device caught fire" in stream.terminals[0].error
        await mesh.settles()


# -- 13 ---------------------------------------------------------------------------------------------------------------
def the_incarnation_in_the_handshake(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Transport, "check_incarnation", lambda *_: None)


@fault(the_incarnation_in_the_handshake)
async def test_13_a_peer_that_restarted_at_its_address_is_not_taken_for_its_former_life() -> None:
    """Same name, same address, same block numbers, same generations, other content."""
    async with Mesh() as mesh:
        former = mesh.prefill
        old = former.transport.endpoint()
        await former.die()
        mesh.prefill = await mesh.start("prefill")
        mesh.prefill.kv[:] = 7
        connection = None
        try:
            connection = await mesh.decode.transport.connect(old, Deadline.after(1))
        except Exception as refused:
            assert former.life in str(refused) and mesh.prefill.life in str(refused)
        assert connection is None, "it reads another life's memory"


def the_incarnation_in_a_members_name(patch: pytest.MonkeyPatch) -> None:
    def same_name(one: Any, other: Any) -> bool:
        return bool(other is not None and one[0] == other[0])

    patch.setattr(books.Actor, "__eq__", same_name)
    patch.setattr(books.Actor, "__ne__", lambda one, other: not same_name(one, other))
    patch.setattr(books.Actor, "__hash__", lambda one: hash(one[0]))


@fault(the_incarnation_in_a_members_name)
async def test_13_an_offer_of_a_former_life_is_worth_nothing() -> None:
    async with Mesh() as mesh:
        relayed = mesh.begin(PROMPT, TOKENS)
        offer = await mesh.offer_of(relayed)
        await until(lambda: relayed.source.terminals)
        former = mesh.prefill
        await former.die()
        mesh.prefill = await mesh.start("prefill")
        handle = former.source._by_handle.popitem()[0] if former.source._by_handle else None
        assert handle is not None
        assert await mesh.prefill.ledger.view(handle)
        assert mesh.host.books.state(handle) is State.LOST, "what a former life owned is lost"
        relayed.destination = mesh.join(offer, PROMPT, TOKENS)
        assert not await mesh.right_or_error(relayed, PROMPT, TOKENS)
        assert not relayed.destination.token_ids
        await mesh.settles()

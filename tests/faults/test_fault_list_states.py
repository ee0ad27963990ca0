"""Case 9 of the fault list, a timeout checked in one state only: every state and every wait has one, and it is kept.

And case 15 between two workers: what comes out of order is refused. And clocks that are set while all this goes on.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import mesh as meshes
import pytest
from guards import fault
from mesh import BLOCK_TOKENS, Mesh, prompt_of, until
from pretend_device import text_of

from tokenrelay.base.deadlines import Deadline
from tokenrelay.ledger.api import Duty, DutyDue, Event, Handle, Joined, Member, State
from tokenrelay.ledger.host import LedgerHost
from tokenrelay.ledger.ledger import DUTIES, EmbeddedLedger
from tokenrelay.ledger.local import LocalLedger
from tokenrelay.ledger.states import DUE, TERMINAL
from tokenrelay.proto import peer_pb2
from tokenrelay.services.decode.destination import Destination, Import
from tokenrelay.services.prefill.export import Export

PROMPT, TOKENS = prompt_of(100), 8
SHORT_S = 0.1
OWNER, PEER = (Member(name=name, incarnation="1", role="decode") for name in ("owner", "peer"))
_WAYS: dict[State, tuple[tuple[Event, Member], ...]] = {
    State.RESERVED: (),
    State.OFFERED: ((Event.OFFER, OWNER),),
    State.CLAIMED: ((Event.OFFER, OWNER), (Event.CLAIM, PEER)),
    State.TRANSFERRING: ((Event.OFFER, OWNER), (Event.CLAIM, PEER), (Event.TRANSFER, PEER)),
    State.QUARANTINED: ((Event.OFFER, OWNER), (Event.CLAIM, PEER), (Event.QUARANTINE, OWNER)),
    State.RETURNED: ((Event.OFFER, OWNER), (Event.CLAIM, PEER), (Event.DECLINE, PEER)),
    State.ADOPTED: ((Event.OFFER, OWNER), (Event.CLAIM, PEER), (Event.SEAL, OWNER), (Event.ADOPT, PEER)),
}


async def do_duties(ledger: LocalLedger) -> None:
    """An owner that does what it is told, and nothing else."""
    acts = {Duty.RECLAIM: ledger.reclaim, Duty.RELEASE: ledger.release, Duty.FENCE: ledger.fence}
    async for notice in ledger.watch(OWNER.actor):
        if isinstance(notice, DutyDue):
            await acts[notice.duty](notice.handle, OWNER.actor)


def the_deadlines_of_all_states_but_one(patch: pytest.MonkeyPatch) -> None:
    due = EmbeddedLedger.due

    def of_offers(self: EmbeddedLedger) -> tuple[list[tuple[Handle, Duty]], float | None]:
        found, ahead_s = due(self)
        return [each for each in found if self.state(each[0]) is State.OFFERED], ahead_s

    patch.setattr(EmbeddedLedger, "due", of_offers)


@fault(the_deadlines_of_all_states_but_one)
async def test_09_every_state_of_a_handle_has_a_deadline_and_somebody_acts_on_it() -> None:
    assert set(_WAYS) == set(DUE) == set(DUTIES), "a state without a deadline, or one that is not tested"
    ledger = LocalLedger(LedgerHost(answer_s=SHORT_S))
    for member in (OWNER, PEER):
        assert isinstance(await ledger.join(member, lease_s=60), Joined)
    doing = asyncio.create_task(do_duties(ledger))
    await asyncio.sleep(0)
    handles = []
    for state, way in _WAYS.items():
        handle = await ledger.reserve(OWNER.actor, extents=1, deadline_s=SHORT_S)
        assert isinstance(handle, Handle)
        for event, member in way:
            timed = event in (Event.OFFER, Event.CLAIM, Event.TRANSFER, Event.QUARANTINE, Event.ADOPT)
            deadline_s = SHORT_S if timed else None
            given = {"extents": 1} if event is Event.SEAL else {}
            assert ledger.host.move(event, handle, member.actor, deadline_s=deadline_s, **given) is None
        assert ledger.host.books.state(handle) is state
        handles.append(handle)
    await until(lambda: all(ledger.host.books.state(handle) in TERMINAL for handle in handles), "all of them end")
    ledger.host.books.check()
    doing.cancel()
    ledger.host.close()


async def fill_decode(mesh: Mesh) -> None:
    occupant = mesh.decode.submit(prompt_of(10 * BLOCK_TOKENS, 3), TOKENS)
    mesh.decode.device.hold = lambda plan: bool(plan.decodes)
    await until(mesh.decode.device.holding.is_set)
    assert not occupant.terminals


async def hold_connections(mesh: Mesh) -> None:
    mesh.wire.connect_held.clear()


async def hold_prefill(mesh: Mesh) -> None:
    mesh.prefill.device.hold = lambda plan: int(plan.starts[0]) >= 3 * BLOCK_TOKENS


async def hold_reads(mesh: Mesh) -> None:
    mesh.wire.hold()


def the_deadline_of_all_waits_but_one(patch: pytest.MonkeyPatch) -> None:
    deadline = Destination._deadline

    def of_the_room(self: Destination, entry: Import) -> Deadline:
        return Deadline.after(3600) if entry.room.done() else deadline(self, entry)

    patch.setattr(Destination, "_deadline", of_the_room)


@fault(the_deadline_of_all_waits_but_one)
async def test_09_every_wait_of_a_destination_has_a_deadline() -> None:
    """For room, for a connection, for the source, for a read that hangs: the client gets its error, and then all of it
    comes back."""
    waits: tuple[Callable[[Mesh], Awaitable[None]], ...] = (fill_decode, hold_connections, hold_prefill, hold_reads)
    for hold in waits:
        async with Mesh(transfer_s=0.4, decode_blocks=12) as mesh:
            await hold(mesh)
            relayed = await mesh.relay(PROMPT, TOKENS)
            destination = relayed.destination
            assert destination is not None
            await until(lambda stream=destination: stream.terminals, f"an answer after {hold.__name__}")
            assert "deadline_exceeded" in destination.terminals[0].error, destination.terminals
            mesh.prefill.abort(relayed.source)
            mesh.wire.open.set()
            mesh.decode.device.go()
            mesh.prefill.device.go()
            await mesh.ends(relayed)
            for view in mesh.host.books.views():  # that nobody claimed waits for a deadline that is far away here
                if view.state is State.OFFERED:
                    await mesh.prefill.source._take_back(mesh.prefill.source._by_handle[view.handle], "")
            await mesh.settles()


def the_order_of_what_a_source_tells(patch: pytest.MonkeyPatch) -> None:
    def believe(self: Destination, entry: Import, extents: peer_pb2.Extents) -> None:
        entry.remote += extents.blocks
        entry.generations += extents.generations

    patch.setattr(Destination, "_note", believe)


@fault(the_order_of_what_a_source_tells)
async def test_15_extents_that_come_late_are_not_taken_for_newer_ones() -> None:
    """All blocks and generations are right, two messages are swapped: KV in the wrong order is a wrong text."""
    async with Mesh() as mesh:
        tell = Export.progress

        async def swapped(export: Any) -> AsyncIterator[peer_pb2.Progress]:
            async for progress in tell(export):
                if progress.WhichOneof("progress") == "extents" and len(progress.extents.blocks) > 1:
                    whole = progress.extents
                    for part in (slice(1, None), slice(0, 1)):
                        yield peer_pb2.Progress(
                            extents=peer_pb2.Extents(
                                first=whole.first + (part.start or 0),
                                blocks=whole.blocks[part],
                                generations=whole.generations[part],
                            )
                        )
                else:
                    yield progress

        relayed = mesh.begin(PROMPT, TOKENS)
        offer = await mesh.offer_of(relayed)
        export = next(iter(mesh.prefill.source._exports.values()))
        export.progress = lambda: swapped(export)  # type: ignore[method-assign]
        await until(lambda: relayed.source.terminals)  # all of it is told in one message, then
        relayed.destination = mesh.join(offer, PROMPT, TOKENS)
        assert not await mesh.right_or_error(relayed, PROMPT, TOKENS)
        assert "out of order" in relayed.destination.terminals[0].error
        await mesh.settles()


def the_monotonic_clock(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(meshes, "LedgerHost", functools.partial(LedgerHost, clock=lambda: time.time()))


@fault(the_monotonic_clock)
async def test_a_clock_that_is_set_changes_nothing() -> None:
    """A day ahead, then two days back, in the middle of a transfer: no claim expires, no deadline stands still."""
    now = time.time
    try:
        async with Mesh() as mesh:
            mesh.wire.hold()
            relayed = await mesh.relay(PROMPT, TOKENS)
            await mesh.wire.waiting.wait()
            for step_s in (86_400, -86_400):
                time.time = lambda step_s=step_s: now() + step_s  # type: ignore[assignment]
                mesh.host._arm(0.0)  # as any other timer of the ledger would
                await asyncio.sleep(0.05)
            mesh.wire.open.set()
            assert await mesh.right_or_error(relayed, PROMPT, TOKENS)
            await mesh.settles()
        time.time = now  # grpc.aio adds a call's time to it, and its core reads the real one
        async with Mesh(transfer_s=0.3) as mesh:
            mesh.wire.hold()
            relayed = await mesh.relay(PROMPT, TOKENS)
            await mesh.wire.waiting.wait()
            time.time = lambda: now() - 3600  # type: ignore[assignment]
            assert not await mesh.right_or_error(relayed, PROMPT, TOKENS)
            mesh.wire.open.set()
            await mesh.settles()
            alone = mesh.decode.submit(PROMPT, TOKENS)
            await until(lambda: alone.terminals)
            assert alone.token_ids == text_of(PROMPT, TOKENS)
    finally:
        time.time = now

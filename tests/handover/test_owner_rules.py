"""What the owner of a handle owes (docs/kv-ownership.md), on a real ledger, with an engine and transports that record.

Each case is a fence of the model (docs/model-checking.md: NO_CUT_WHEN_FORGOTTEN, NO_CUT_OF_THE_DEAD, FREE_WHEN_LOST,
FENCE_WITHOUT_CUTTING): pins go back only after whoever was told of the blocks has answered or is proven cut off.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tokenrelay.base.deadlines import Deadline
from tokenrelay.base.errors import DeadlineExceeded
from tokenrelay.ledger.api import Actor, Handle, Member, MemberJoined, Rejection, Snapshot, State
from tokenrelay.ledger.local import LocalLedger
from tokenrelay.proto import peer_pb2, worker_pb2
from tokenrelay.runtime.handover import HandleEvent, Sealed
from tokenrelay.runtime.requests import EngineOutput, EngineRequest, Finish
from tokenrelay.services.prefill import fences
from tokenrelay.services.prefill.source import Source
from tokenrelay.transfer.transport import Identity, Proof

FREES = {HandleEvent.RELEASE, HandleEvent.RECLAIM, HandleEvent.FENCE, HandleEvent.LOSE}
DECODE = Actor("decode", "d1")


class RecordingEngine:
    """Takes everything; keeps the order of what concerns handles."""

    def __init__(self, story: list[str]) -> None:
        self.handover = self
        self._story = story

    def submit(self, request: EngineRequest) -> None:
        self._story.append("submit")

    def abort(self, sequence_id: int, error: Exception | None = None) -> None:
        self._story.append("abort")

    def move(self, sequence_id: int, *events: HandleEvent, then: Callable[[str | None], None] | None = None) -> None:
        if FREES & set(events):
            self._story.append("free")
        if then is not None:
            then(None)


class RecordingTransport:
    """A transport whose proof can be withheld."""

    kind = "recorded"

    def __init__(self, story: list[str]) -> None:
        self.proven = asyncio.Event()
        self.proven.set()
        self.fenced: set[str] = set()
        self._story = story

    def endpoint(self) -> bytes:
        return b""

    def peers(self) -> list[Identity]:
        return [Identity("stranger", "s1")]

    def readmit(self, incarnation: str) -> None:
        self.fenced.discard(incarnation)

    async def fence(self, incarnation: str, deadline: Deadline, *, kill: bool = False) -> Proof:
        self.fenced.add(incarnation)
        self._story.append(f"cut {incarnation}")
        try:
            await asyncio.wait_for(self.proven.wait(), deadline.left_s())
        except TimeoutError:
            raise DeadlineExceeded("no proof") from None
        self._story.append(f"proof {incarnation}")
        return Proof.GONE


class Scene:
    """A source in a fleet with one decode, and what happened in order."""

    def __init__(self) -> None:
        self.story: list[str] = []
        self.over: list[str] = []
        self.outputs: list[worker_pb2.SequenceOutput] = []
        self.ledger = LocalLedger()
        self.actor = Actor("prefill", "p1")
        self.transport = RecordingTransport(self.story)
        self.source = Source(
            RecordingEngine(self.story),  # type: ignore[arg-type]
            self.ledger,
            self.actor,
            [self.transport],  # type: ignore[list-item]
            self.outputs.append,
            address="unix:/nowhere",
            handle_deadline_s=30.0,
            ledger_wait_s=5.0,
            on_life_over=self.over.append,
        )
        self._tasks: list[asyncio.Task[Any]] = []

    async def start(self) -> None:
        for actor in (self.actor, DECODE):
            joined = await self.ledger.join(member_of(actor), lease_s=30)
            assert not isinstance(joined, Rejection)
        self.spawn(self.source.watch())
        await quiet()

    def spawn(self, work: Any) -> None:
        self._tasks.append(asyncio.create_task(work))

    async def offer(self, sequence_id: int = 7) -> Handle:
        """A request whose first two blocks are sealed."""
        request = EngineRequest(sequence_id, np.arange(100, dtype=np.uint32), 100, 4)
        self.source.submit(request)
        await quiet()
        offer = peer_pb2.KvOffer.FromString(self.outputs[-1].offer)
        self.source.sealed(Sealed(sequence_id, 0, (3, 4), (1, 1)))
        return Handle(offer.number, offer.generation, offer.term)

    async def follow(self, handle: Handle, reader: Actor = DECODE, sequence_id: int = 7) -> list[peer_pb2.Progress]:
        """A reader that is told of blocks; it goes on being told in the background."""
        told: list[peer_pb2.Progress] = []
        request = peer_pb2.FollowHandle(
            number=handle.number,
            generation=handle.generation,
            term=handle.term,
            sequence=sequence_id,
            incarnation=self.actor.incarnation,
            claimant=reader.name,
            claimant_incarnation=reader.incarnation,
        )

        async def abort(code: object, text: str) -> None:
            raise LookupError(text)

        async def read() -> None:
            async for progress in self.source.Follow(request, SimpleNamespace(abort=abort)):  # type: ignore[arg-type]
                told.append(progress)

        task = asyncio.create_task(read())
        self._tasks.append(task)
        await quiet()
        if task.done():
            task.result()
        return told

    async def close(self) -> None:
        await self.source.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.ledger.host.close()

    def in_order(self, *wanted: str) -> bool:
        """Whether these are in the story, in this order."""
        rest = iter(self.story)
        return all(any(step == want for step in rest) for want in wanted)


def member_of(actor: Actor) -> Member:
    return Member(name=actor.name, incarnation=actor.incarnation, role=actor.name)


async def quiet() -> None:
    """Everything that can run without time passing has run."""
    for _ in range(50):
        await asyncio.sleep(0)


async def until(holds: Callable[[], bool], what: object) -> None:
    for _ in range(400):
        if holds():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(what)


@pytest.fixture
async def scene(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scene]:
    monkeypatch.setattr(fences, "GRACE_S", 0.02)
    monkeypatch.setattr(fences, "FENCE_S", 0.02)
    monkeypatch.setattr(fences, "AGAIN_FIRST_S", 0.02)
    scene = Scene()
    await scene.start()
    yield scene
    await scene.close()


def forget(scene: Scene, *alive: Actor) -> None:
    """What a kvstore says that has lost its handles."""
    members = tuple(member_of(actor) for actor in (scene.actor, *alive))
    scene.source._on_notice(Snapshot(5, members, ()))


async def test_a_forgotten_handle_whose_claim_was_not_heard_of(scene: Scene) -> None:
    """The claim was granted by a kvstore that died before it told this owner; the reader has followed."""
    handle = await scene.offer()
    told = await scene.follow(handle)
    assert [list(progress.extents.blocks) for progress in told] == [[3, 4]]
    scene.transport.proven.clear()
    forget(scene, DECODE)
    await until(lambda: scene.story.count("cut d1") >= 2, scene.story)
    assert "free" not in scene.story and scene.source.handles_open == 1
    scene.transport.proven.set()
    await until(lambda: scene.source.handles_open == 0, scene.story)
    assert scene.in_order("cut d1", "proof d1", "free")
    assert "d1" not in scene.transport.fenced  # it lives: only this handle is over for it
    assert told[-1].WhichOneof("progress") == "gone"
    with pytest.raises(LookupError):
        await scene.follow(handle)


async def test_nobody_is_cut_off_who_was_told_nothing(scene: Scene) -> None:
    await scene.offer()
    forget(scene, DECODE)
    await until(lambda: scene.source.handles_open == 0, scene.story)
    assert "free" in scene.story and "cut d1" not in scene.story


@pytest.mark.parametrize("claims", [True, False])
async def test_a_life_that_ended_is_cut_off(scene: Scene, claims: bool) -> None:
    """With a claim its blocks wait for the proof; without one it can get no connection any more."""
    handle = await scene.offer()
    if claims:
        assert await scene.ledger.claim(handle, DECODE) is None
        await scene.follow(handle)
    scene.transport.proven.clear()
    scene.ledger.host.end([DECODE], "nothing was heard of it")
    await until(lambda: "cut d1" in scene.story, scene.story)
    if claims:
        await asyncio.sleep(0.1)
        assert "free" not in scene.story
    with pytest.raises(LookupError):
        await scene.follow(handle)  # a paused process that wakes up
    scene.transport.proven.set()
    if claims:
        await until(lambda: scene.source.handles_open == 0, scene.story)
        assert scene.in_order("cut d1", "proof d1", "free")
    await until(lambda: "proof d1" in scene.story, scene.story)
    assert "d1" in scene.transport.fenced  # for ever
    scene.source._on_notice(MemberJoined(member_of(DECODE)))
    assert "d1" in scene.transport.fenced


async def test_a_life_that_no_snapshot_names_is_cut_off(scene: Scene) -> None:
    forget(scene)
    await until(lambda: {"d1", "s1"} <= scene.transport.fenced, scene.story)
    scene.source._on_notice(MemberJoined(member_of(Actor("stranger", "s1"))))  # it was only not heard of yet
    assert scene.transport.fenced == {"d1"}


async def test_nothing_goes_back_in_a_life_that_is_over(scene: Scene) -> None:
    handle = await scene.offer()
    assert await scene.ledger.claim(handle, DECODE) is None
    await scene.follow(handle)
    scene.ledger.host.end([scene.actor], "its lease ran out")
    await until(lambda: bool(scene.over), scene.story)
    scene.source.emit(EngineOutput(7, finish=Finish.ABORT))
    forget(scene, DECODE)
    await asyncio.sleep(0.1)
    assert len(scene.over) == 1
    assert "free" not in scene.story, scene.story


async def test_a_fence_by_the_ledger_waits_for_the_cutting_off(scene: Scene) -> None:
    """A claimant that left in good order: its claims are fenced in the ledger, and here after the proof."""
    handle = await scene.offer()
    assert await scene.ledger.claim(handle, DECODE) is None
    await scene.follow(handle)
    scene.transport.proven.clear()
    assert await scene.ledger.leave(DECODE) is None
    view = await scene.ledger.view(handle)
    assert not isinstance(view, Rejection) and view.state is State.FENCED
    await asyncio.sleep(0.1)
    assert "free" not in scene.story
    scene.transport.proven.set()
    await until(lambda: scene.source.handles_open == 0, scene.story)
    assert scene.in_order("cut d1", "proof d1", "free")


async def test_an_adoption_is_an_answer(scene: Scene) -> None:
    """Nobody is cut off when the reader said that it is done."""
    handle = await scene.offer()
    assert await scene.ledger.claim(handle, DECODE) is None
    told = await scene.follow(handle)
    scene.source.emit(EngineOutput(7, token_ids=[5], finish=Finish.HANDOVER))
    await quiet()
    assert told[-1].complete.first_token == 5
    assert await scene.ledger.adopt(handle, DECODE) is None
    await until(lambda: scene.source.handles_open == 0, scene.story)
    assert "free" in scene.story and "cut d1" not in scene.story


async def test_a_refusal_is_an_answer(scene: Scene) -> None:
    """Other handovers go on over the connections of whoever declined."""
    handle = await scene.offer()
    assert await scene.ledger.claim(handle, DECODE) is None
    await scene.follow(handle)
    assert await scene.ledger.decline(handle, DECODE) is None
    await until(lambda: scene.source.handles_open == 0, scene.story)
    assert "free" in scene.story and "cut d1" not in scene.story


@pytest.mark.parametrize("claimed", [False, True])
async def test_an_offer_that_is_withdrawn(scene: Scene, claimed: bool) -> None:
    """Long before its deadline; whoever has claimed it answers first."""
    handle = await scene.offer()
    if claimed:
        assert await scene.ledger.claim(handle, DECODE) is None
    scene.source.withdraw(7)
    assert scene.source.handles_open == 1, "it is computed: an abort is what ends it"
    scene.source.emit(EngineOutput(7, token_ids=[5], finish=Finish.HANDOVER))
    await quiet()
    scene.source.withdraw(7)
    await quiet()
    if claimed:
        assert "free" not in scene.story
        assert await scene.ledger.decline(handle, DECODE) is None
    await until(lambda: scene.source.handles_open == 0, scene.story)
    assert "free" in scene.story and "cut d1" not in scene.story
    scene.source.withdraw(7)


async def test_an_abort_that_the_end_has_overtaken(scene: Scene) -> None:
    """The engine ended the sequence before it heard of the abort: its offer is taken back all the same."""
    await scene.offer()
    scene.source.abort(7)
    scene.source.emit(EngineOutput(7, token_ids=[5], finish=Finish.HANDOVER))
    await until(lambda: scene.source.handles_open == 0, scene.story)
    assert "free" in scene.story


async def test_a_handle_that_nothing_belongs_to_is_ended(scene: Scene) -> None:
    """The answer to a reservation was lost with its connection, and a snapshot names the handle."""
    handle = await scene.ledger.reserve(scene.actor, extents=1, deadline_s=30)
    assert isinstance(handle, Handle)
    view = await scene.ledger.view(handle)
    assert not isinstance(view, Rejection)
    scene.source._on_notice(Snapshot(0, (member_of(scene.actor), member_of(DECODE)), (view,)))
    await quiet()
    assert await scene.ledger.views(scene.actor) == []

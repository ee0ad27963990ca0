"""Writer and reader of the block tier, against an engine and a tier that do what a test says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from tokenrelay.base.errors import Overloaded
from tokenrelay.ledger.api import Block, Code, Rejection
from tokenrelay.libscheduler import ImportAnswer, block_hashes
from tokenrelay.runtime.handover import Handover, Room
from tokenrelay.runtime.requests import EngineRequest
from tokenrelay.services.prefill import tier_reader, tier_writer
from tokenrelay.services.prefill.tier_reader import FIRST_ID, TierReader
from tokenrelay.services.prefill.tier_writer import TierWriter
from tokenrelay.transfer.memory import Layout, SharedPool

TOKENS = 16
KEY, MODEL = b"k" * 16, b"m" * 16
BYTES = (64, 32)  # of a block, per layer


class Engine:
    """Makes room at once, where a test gives it blocks."""

    def __init__(self) -> None:
        self.handover = self
        self.reader: TierReader | None = None
        self.room: Room | None = Room(0, 0, ())
        self.places: dict[bytes, tuple[int, int]] = {}
        self.submitted: list[EngineRequest] = []
        self.story: list[str] = []
        self.error: Exception | None = None

    def submit(self, request: EngineRequest) -> None:
        if self.error is not None:
            raise self.error
        self.submitted.append(request)
        if self.room is not None and self.reader is not None:
            room = Room(request.sequence_id, self.room.cached_tokens, self.room.blocks)
            asyncio.get_running_loop().call_soon(self.reader.room, room)

    def abort(self, sequence_id: int, error: Exception | None = None) -> None:
        self.story.append("abort")

    def stopped(self, sequence_id: int, first_token: int | None = None) -> None:
        self.story.append("stopped")

    def imported(self, sequence_id: int, first_token: int, then: Callable[[ImportAnswer], None]) -> None:
        self.story.append("imported")
        then(ImportAnswer.DONE)

    def locate(self, block_hash: bytes, then: Callable[[int, int], None]) -> None:
        then(*self.places.get(block_hash, (-1, 0)))


class Tier:
    """Blocks by hash."""

    def __init__(self) -> None:
        self.blocks: dict[bytes, bytes] = {}
        self.silent = False
        self.asked = 0
        self.refusal: Rejection | None = None

    async def contains(self, hashes: Sequence[bytes], layout: str) -> int:
        self.asked += 1
        if self.silent:
            await asyncio.sleep(60)
        return next((at for at, block_hash in enumerate(hashes) if block_hash not in self.blocks), len(hashes))

    async def get(self, block_hash: bytes, layout: str) -> Block | None:
        payload = self.blocks.get(block_hash)
        return None if not payload else Block(block_hash, layout, payload)

    async def put(self, block: Block) -> Rejection | None:
        if self.refusal is None:
            self.blocks[block.block_hash] = block.payload
        return self.refusal


class Scene:
    """A prompt of six full blocks and a part of one; the worker has the first."""

    def __init__(self) -> None:
        self.engine, self.tier, self.pool = Engine(), Tier(), SharedPool(BYTES, 16)
        self.tokens = np.arange(6 * TOKENS + 5, dtype=np.uint32)
        self.hashes = block_hashes(self.tokens, block_tokens=TOKENS, hash_key=KEY, model_identity=MODEL)
        self.held = {self.hashes[0]: None}
        self.engine.reader = self.reader = TierReader(
            self.engine,  # type: ignore[arg-type]
            self.pool,
            self.tier,
            "layout",
            held=self.held,
            block_tokens=TOKENS,
            hash_key=KEY,
            model_identity=MODEL,
            tokens_min=2 * TOKENS,
        )
        layout = Layout(model_identity=MODEL, dtype="f", block_tokens=TOKENS, layout="l", block_bytes=BYTES)
        self.memory = self.pool.memory(layout)
        self.writer = TierWriter(self.engine, self.pool, self.memory, self.tier, "layout")  # type: ignore[arg-type]

    def keep(self, first: int, last: int) -> None:
        """The tier has these blocks of the prompt."""
        for at in range(first, last):
            self.tier.blocks[self.hashes[at]] = bytes([at + 1]) * self.pool.payload_bytes

    def request(self, **fields: object) -> EngineRequest:
        return EngineRequest(1, self.tokens, self.tokens.size, 8, **fields)  # type: ignore[arg-type]

    def room(self, cached_blocks: int, *blocks: int) -> None:
        self.engine.room = Room(0, cached_blocks * TOKENS, blocks)

    async def load(self, **fields: object) -> int:
        request = self.request(**fields)
        return await self.reader.load(request) if self.reader.wants(request) else 0


@pytest.fixture
async def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    for name in ("LOOK_S", "ROOM_S"):
        monkeypatch.setattr(tier_reader, name, 0.1)
    monkeypatch.setattr(tier_writer, "REST_FIRST_S", 0.05)
    return Scene()


async def test_the_bytes_lie_where_the_engine_made_room(scene: Scene) -> None:
    scene.keep(1, 4)
    scene.room(1, 9, 3, 12)
    assert await scene.load() == 3 * TOKENS
    assert [scene.pool.read_block(block)[0] for block in (9, 3, 12)] == [2, 3, 4]
    assert scene.engine.story == ["imported", "abort"]
    (load,) = scene.engine.submitted
    assert load.sequence_id >= FIRST_ID and load.handover == Handover.DESTINATION
    assert load.token_ids.tolist() == list(range(4 * TOKENS))


async def test_a_salt_is_another_prefix(scene: Scene) -> None:
    scene.keep(0, 6)
    assert await scene.load(salt=b"tenant") == 0
    assert scene.engine.submitted == [] and scene.tier.asked == 1


async def test_what_is_in_the_cache_already_is_not_written_again(scene: Scene) -> None:
    scene.keep(1, 4)
    scene.room(3, 12)  # two more were sealed here meanwhile
    assert await scene.load() == TOKENS
    assert scene.pool.read_block(12)[0] == 4


@pytest.mark.parametrize("payload", [b"", b"short"])
async def test_a_block_that_is_not_whole_ends_the_prefix(scene: Scene, payload: bytes) -> None:
    scene.keep(1, 6)
    scene.tier.blocks[scene.hashes[4]] = payload
    scene.room(1, 5, 6, 7)
    assert await scene.load() == 3 * TOKENS
    scene.tier.blocks[scene.hashes[1]] = payload
    assert await scene.load() == 0


async def test_what_was_evicted_meanwhile_makes_the_load_vain(scene: Scene) -> None:
    scene.keep(1, 4)
    scene.room(0, 1, 2, 3, 4)
    assert await scene.load() == 0
    assert scene.engine.story == ["abort", "stopped"]


async def test_a_room_that_comes_late_is_given_back(scene: Scene) -> None:
    scene.keep(1, 4)
    scene.engine.room = None
    assert await scene.load() == 0
    assert scene.engine.story == ["abort"]
    load = scene.engine.submitted[0]
    assert scene.reader.room(Room(load.sequence_id, 0, (1, 2, 3, 4)))
    assert scene.engine.story == ["abort", "stopped"]
    assert not scene.reader.room(Room(7, 0, ()))


async def test_an_engine_that_refuses_costs_nothing(scene: Scene) -> None:
    scene.keep(1, 4)
    scene.engine.error = Overloaded("full")
    assert await scene.load() == 0


async def test_a_silent_tier_is_left_alone(scene: Scene) -> None:
    scene.tier.silent = True
    assert await scene.load() == 0
    assert await scene.load() == 0
    assert scene.tier.asked == 1


async def test_one_load_for_all_who_want_it_and_a_bound(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.keep(1, 4)
    scene.room(1, 9, 3, 12)
    assert await asyncio.gather(scene.load(), scene.load()) == [3 * TOKENS] * 2
    assert len(scene.engine.submitted) == 1
    monkeypatch.setattr(tier_reader, "LOADS_MAX", 0)
    assert await scene.load() == 0
    assert scene.reader.counts["busy"] == 1


async def test_a_short_prompt_and_a_next_turn_ask_nobody(scene: Scene) -> None:
    scene.keep(0, 6)
    scene.tokens = scene.tokens[: 2 * TOKENS]  # its last token is computed: one block can be found
    assert await scene.load() == 0
    assert not scene.reader.wants(Scene().request(parent=3, parent_tokens=40))
    assert scene.tier.asked == 0


async def test_blocks_are_written_behind(scene: Scene) -> None:
    for at in range(3):
        scene.pool.write_block(at, bytes([at + 1]) * scene.pool.payload_bytes)
        scene.engine.places[scene.hashes[at]] = (at, 0)
    scene.keep(1, 2)
    scene.writer.start()
    scene.writer.publish([("sealed", block_hash) for block_hash in scene.hashes[:4]])
    scene.writer.publish([("evicted", scene.hashes[2]), ("lost", b"")])
    await asyncio.wait_for(scene.writer.settled(), 5)
    await scene.writer.stop()
    assert set(scene.tier.blocks) == set(scene.hashes[:2])
    assert scene.tier.blocks[scene.hashes[0]] == b"\1" * scene.pool.payload_bytes
    assert scene.writer.counts == {"written": 1, "known": 1, "evicted": 2}


async def test_a_block_that_was_reused_while_it_was_read_is_dropped(scene: Scene) -> None:
    scene.engine.places[scene.hashes[0]] = (5, 0)

    def taken(block: int) -> bytes:
        scene.memory.bump([block])  # the engine takes it for another sequence
        return b"x" * scene.pool.payload_bytes

    scene.pool.read_block = taken  # type: ignore[method-assign]
    scene.writer.start()
    scene.writer.publish([("sealed", scene.hashes[0])])
    await asyncio.wait_for(scene.writer.settled(), 5)
    await asyncio.sleep(0.05)
    await scene.writer.stop()
    assert scene.writer.counts["stale"] == 1 and not scene.tier.blocks


async def test_a_full_tier_rests_the_writer_and_the_queue_is_bounded(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tier_writer, "WAITING_MAX", 2)
    for at in range(4):
        scene.engine.places[scene.hashes[at]] = (at, 0)
    scene.tier.refusal = Rejection(Code.FULL, "full")
    scene.writer.publish([("sealed", block_hash) for block_hash in scene.hashes[:4]])
    assert scene.writer.waiting == 2 and scene.writer.counts["dropped"] == 2
    scene.writer.start()
    await asyncio.sleep(0.02)
    assert scene.writer.counts["refused"] == 1 and scene.writer.waiting == 1
    scene.tier.refusal = None
    await asyncio.wait_for(scene.writer.settled(), 5)
    await asyncio.sleep(0.05)
    await scene.writer.stop()
    assert scene.writer.counts["written"] == 1

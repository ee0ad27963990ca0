"""Prefixes that this worker lacks and the fleet's block tier has: loaded instead of computed.

    reader = TierReader(engine, pool, tier, layout, …)
    if reader.wants(request):
        await reader.load(request)      # then submit the request: the prefix is in the cache, or it is computed

A load is a sequence of its own that is never anybody's request: a destination (docs/handover.md) whose source is the
tier. The engine makes room, the bytes are written into its blocks, `imported` seals them under the hashes that this
worker's scheduler computes from the tokens, and the sequence ends; its blocks stay as cache. So nothing is written into
blocks that a transfer does not own, and an engine that is full keeps the load waiting like everybody else.

Bytes come before the room: a tier that is slow holds no block. Each one's checksum was verified after it came (ledger,
TierClient), and its size is here. Whatever goes wrong costs the load, and the prompt is computed.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass, field

from tokenrelay.base.deadlines import Deadline
from tokenrelay.base.errors import TokenRelayError
from tokenrelay.base.logging import get_logger
from tokenrelay.ledger.api import Tier
from tokenrelay.runtime.engine import Engine
from tokenrelay.runtime.handover import Handover, ImportAnswer, Room, block_hashes
from tokenrelay.runtime.requests import EngineOutput, EngineRequest
from tokenrelay.transfer.memory import SharedPool

log = get_logger("tier-reader")

FIRST_ID = 1 << 62  # of loads; those of requests count up from small numbers
LOADS_MAX = 4  # at once; one more request computes
BYTES_MAX = 256 << 20  # of one load
READS = 8  # blocks asked for at once, per load
LOOK_S = 0.25  # to learn what is there: every request with a prefix that is not here waits for it
REST_S = 5.0  # nothing is asked for so long after a tier that did not answer in time
FETCH_S = 5.0  # until all bytes are here
ROOM_S = 2.0  # until the engine has room
ANSWER_S = 10.0  # until the engine has taken an import; a step may be in its way


@dataclass(slots=True)
class _Load:
    """A sequence whose blocks are written here."""

    room: asyncio.Future[Room] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class TierReader:
    """Of one worker. Event loop only."""

    def __init__(
        self,
        engine: Engine,
        pool: SharedPool,
        tier: Tier,
        layout: str,
        *,
        held: Container[bytes],
        block_tokens: int,
        hash_key: bytes,
        model_identity: bytes,
        tokens_min: int,
    ) -> None:
        """`held`: hashes of the blocks that this worker has, kept up to date. `tokens_min`: fewer are computed."""
        self.counts: Counter[str] = Counter()  # loads by how they ended, and "tokens"
        self._engine = engine
        self._pool = pool
        self._tier = tier
        self._layout = layout
        self._held = held
        self._block_tokens = block_tokens
        self._hash_key = hash_key
        self._model_identity = model_identity
        self._blocks_min = max(1, -(-tokens_min // block_tokens))
        self._blocks_max = max(1, BYTES_MAX // pool.payload_bytes)
        self._rest_until_s = 0.0
        self._ids = itertools.count(FIRST_ID)
        self._loads: dict[int, _Load] = {}
        self._running: dict[bytes, asyncio.Task[int]] = {}  # by the hash of the prompt's last full block

    # -- requests -----------------------------------------------------------------------------------------------------
    def wants(self, request: EngineRequest) -> bool:
        """Whether it may be worth a look. A next turn that names its parent has its text here."""
        if time.monotonic() < self._rest_until_s:
            return False
        return request.parent is None and self._full_blocks(request) >= self._blocks_min

    def _full_blocks(self, request: EngineRequest) -> int:
        """Blocks of its text that can be found: a token is left to be computed."""
        return (int(request.token_ids.size) - 1) // self._block_tokens

    async def load(self, request: EngineRequest) -> int:
        """Tokens that came from the tier; 0: none, for whatever reason. Goes on to its end when it is cancelled."""
        hashes = block_hashes(
            request.token_ids[: self._full_blocks(request) * self._block_tokens],
            block_tokens=self._block_tokens,
            hash_key=self._hash_key,
            model_identity=self._model_identity,
            salt=request.salt,
        )
        first = next((at for at, block_hash in enumerate(hashes) if block_hash not in self._held), len(hashes))
        if len(hashes) - first < self._blocks_min:
            return 0
        task = self._running.get(hashes[-1])
        if task is None:
            if len(self._running) >= LOADS_MAX:
                self.counts["busy"] += 1
                return 0
            task = asyncio.create_task(self._load(request, hashes, first), name="tier load")
            self._running[hashes[-1]] = task
            task.add_done_callback(lambda _: self._running.pop(hashes[-1], None))
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Until nothing is written into the pool any more."""
        await asyncio.gather(*self._running.values(), return_exceptions=True)

    async def _load(self, request: EngineRequest, hashes: list[bytes], first: int) -> int:
        try:
            payloads = await self._fetch(hashes[first : first + self._blocks_max])
            if len(payloads) < self._blocks_min:
                self.counts["missed"] += 1
                return 0
            blocks = await self._import(request, first, payloads)
        except TokenRelayError as error:
            log.info("a prefix is not loaded", reason=error.message)
            blocks = 0
        except Exception:
            log.exception("a load failed in an unforeseen way")
            blocks = 0
        self.counts["loaded" if blocks else "failed"] += 1
        self.counts["tokens"] += blocks * self._block_tokens
        return blocks * self._block_tokens

    # -- from the tier ------------------------------------------------------------------------------------------------
    async def _fetch(self, wanted: list[bytes]) -> list[bytes]:
        """Payloads of the first blocks, as far as they are there and whole."""
        try:
            there = await asyncio.wait_for(self._tier.contains(wanted, self._layout), LOOK_S)
        except TimeoutError:
            self.counts["silent"] += 1
            self._rest_until_s = time.monotonic() + REST_S
            return []
        if there < self._blocks_min:
            return []
        found: list[bytes | None] = [None] * there
        places = iter(range(there))

        async def read() -> None:
            for at in places:
                block = await self._tier.get(wanted[at], self._layout)
                if block is None or len(block.payload) != self._pool.payload_bytes:
                    return
                found[at] = block.payload

        readers = [asyncio.create_task(read()) for _ in range(min(READS, there))]
        await asyncio.wait(readers, timeout=FETCH_S)
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
        return [payload for payload in itertools.takewhile(lambda payload: payload is not None, found) if payload]

    # -- into the pool ------------------------------------------------------------------------------------------------
    async def _import(self, request: EngineRequest, first: int, payloads: list[bytes]) -> int:
        """Blocks that are in the cache now. Afterwards nothing writes into the pool."""
        tokens = (first + len(payloads)) * self._block_tokens
        load_id, load = next(self._ids), _Load()
        self._loads[load_id] = load
        try:
            self._engine.submit(self._sequence(load_id, request, tokens))
            room = await asyncio.wait_for(load.room, ROOM_S)
        except TimeoutError:
            self.counts["no_room"] += 1
            return 0
        finally:
            del self._loads[load_id]
            if not load.room.done() or load.room.cancelled():  # a room that comes later is given back by `room`
                self._engine.abort(load_id)
        skipped = room.cached_tokens // self._block_tokens - first
        whole = skipped >= 0 and len(room.blocks) == len(payloads) - skipped
        if not whole:  # some of what was here is gone: it would have to be fetched too
            self._engine.abort(load_id)
            self._engine.handover.stopped(load_id)
            return 0
        try:
            await asyncio.to_thread(self._write, room.blocks, payloads[skipped:])
        except BaseException:
            self._engine.abort(load_id)
            self._engine.handover.stopped(load_id)
            raise
        return len(room.blocks) if await self._imported(load_id) else 0

    def _sequence(self, load_id: int, request: EngineRequest, tokens: int) -> EngineRequest:
        return EngineRequest(
            load_id,
            request.token_ids[:tokens].copy(),
            output_start=tokens,
            tokens_max=2,  # the one that is said to be the first, and one that nobody waits for
            priority=request.priority,
            salt=request.salt,
            tenant=request.tenant,
            deadline=Deadline.after(ROOM_S + ANSWER_S),
            request_id=f"{request.request_id} (load)",
            handover=Handover.DESTINATION,
        )

    def _write(self, blocks: tuple[int, ...], payloads: list[bytes]) -> None:
        for block, payload in zip(blocks, payloads, strict=True):
            self._pool.write_block(block, payload)

    async def _imported(self, load_id: int) -> bool:
        """The blocks are sealed; the sequence has done what it is for."""
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[ImportAnswer] = loop.create_future()

        def tell(answer: ImportAnswer) -> None:
            if not answered.done():
                answered.set_result(answer)

        def done(answer: ImportAnswer) -> None:
            loop.call_soon_threadsafe(tell, answer)

        self._engine.handover.imported(load_id, 0, done)
        try:
            return await asyncio.wait_for(answered, ANSWER_S) is ImportAnswer.DONE
        except TimeoutError:
            return False
        finally:
            self._engine.abort(load_id)

    # -- from the engine ----------------------------------------------------------------------------------------------
    def room(self, notice: Room) -> bool:
        """The engine made room. False: for somebody else."""
        if notice.sequence_id < FIRST_ID:
            return False
        load = self._loads.get(notice.sequence_id)
        if load is None or load.room.done():  # it was given up just before: nobody will write there
            self._engine.handover.stopped(notice.sequence_id)
        else:
            load.room.set_result(notice)
        return True

    def emit(self, output: EngineOutput) -> bool:
        """An output of a load is nobody's. False: it is somebody's."""
        return output.sequence_id >= FIRST_ID

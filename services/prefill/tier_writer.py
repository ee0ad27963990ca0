"""Sealed blocks on their way to the fleet's block tier, behind the work: bounded, one at a time, nobody waits for it.

    writer = TierWriter(engine, pool, tier, layout)
    writer.start()
    writer.publish([("sealed", block_hash), …])         # never waits

A block is read while the engine goes on: its generation is read with its place, and again after its bytes. A block that
was taken for others in between is dropped (law 4). What does not fit in the queue is dropped, oldest first: the tier is
a cache.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Sequence

from tokenrelay.base.logging import get_logger
from tokenrelay.ledger.api import Block, CacheEvent, Code, Tier
from tokenrelay.runtime.engine import Engine
from tokenrelay.transfer.memory import Memory, SharedPool

log = get_logger("tier-writer")

WAITING_MAX = 8192  # hashes
ANSWER_S = 5.0  # for the engine to say where a block is
REST_FIRST_S, REST_MAX_S = 1.0, 30.0  # while the tier is full or away, doubled each time


class TierWriter:
    """Of one worker. Event loop only."""

    def __init__(self, engine: Engine, pool: SharedPool, memory: Memory, tier: Tier, layout: str) -> None:
        """`memory`: of `pool`, for its generation words. `layout`: see `tier_layout`."""
        self.counts: Counter[str] = Counter()  # by what became of a block
        self._engine = engine
        self._pool = pool
        self._memory = memory
        self._tier = tier
        self._layout = layout
        self._waiting: OrderedDict[bytes, None] = OrderedDict()
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Blocks that wait to be written."""
        return len(self._waiting)

    def start(self) -> None:
        """Write from now on."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="tier writer")

    async def stop(self) -> None:
        """Write no more."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def publish(self, events: Sequence[CacheEvent]) -> None:
        """What became cache here, or ceased to be."""
        for kind, block_hash in events:
            if kind == "sealed":
                self._waiting[block_hash] = None
                if len(self._waiting) > WAITING_MAX:
                    self._waiting.popitem(last=False)
                    self.counts["dropped"] += 1
            elif self._waiting.pop(block_hash, 0) is None:
                self.counts["evicted"] += 1
        if self._waiting:
            self._idle.clear()
            self._work.set()

    async def settled(self) -> None:
        """Until nothing waits."""
        while self._waiting:
            await self._idle.wait()

    async def _run(self) -> None:
        rest_s = REST_FIRST_S
        while True:
            if not self._waiting:
                self._idle.set()
                self._work.clear()
                await self._work.wait()
                continue
            block_hash, _ = self._waiting.popitem(last=False)
            try:
                outcome = await self._write(block_hash)
            except Exception:  # of one block: the next one may do
                log.exception("a block was not written behind")
                outcome = "failed"
            self.counts[outcome] += 1
            if outcome in ("refused", "unavailable"):
                await asyncio.sleep(rest_s)
                rest_s = min(2 * rest_s, REST_MAX_S)
            else:
                rest_s = REST_FIRST_S

    async def _write(self, block_hash: bytes) -> str:
        if await self._tier.contains([block_hash], self._layout):
            return "known"
        found = await self._locate(block_hash)
        if found is None:
            return "evicted"
        block, generation = found
        payload = await asyncio.to_thread(self._pool.read_block, block)
        if int(self._memory.words([block])[0]) != generation:
            return "stale"
        refusal = await self._tier.put(Block(block_hash, self._layout, payload))
        if refusal is None:
            return "written"
        return "unavailable" if refusal.code is Code.UNAVAILABLE else "refused"

    async def _locate(self, block_hash: bytes) -> tuple[int, int] | None:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[tuple[int, int]] = loop.create_future()

        def tell(place: tuple[int, int]) -> None:
            if not answer.done():
                answer.set_result(place)

        def found(block: int, generation: int) -> None:
            loop.call_soon_threadsafe(tell, (block, generation))

        self._engine.handover.locate(block_hash, found)
        block, generation = await asyncio.wait_for(answer, ANSWER_S)
        return None if block < 0 else (block, generation)


def tier_layout(*, dtype: str, layout: str, block_tokens: int, width: int, payload_bytes: int) -> str:
    """What must be equal for a block's bytes to mean the same: members with another word never see each other's."""
    return f"{dtype}|{layout}|{block_tokens}|{width}|{payload_bytes}"

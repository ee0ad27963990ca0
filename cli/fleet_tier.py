"""The fleet's block tier, as one worker uses it: what it seals goes there, what it lacks comes from there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from tokenrelay.ledger.client import KvstoreClient
from tokenrelay.ledger.tier_client import TierClient
from tokenrelay.proto import worker_pb2
from tokenrelay.services.chassis.metrics import Page
from tokenrelay.services.prefill.tier_reader import TierReader
from tokenrelay.services.prefill.tier_writer import TierWriter, tier_layout

if TYPE_CHECKING:
    from tokenrelay.ledger.api import Member
    from tokenrelay.ledger.feed import DirectoryFeed
    from tokenrelay.runtime.engine import Engine
    from tokenrelay.runtime.requests import EngineRequest
    from tokenrelay.services.chassis.security import Security
    from tokenrelay.transfer.memory import Memory, SharedPool

Start = Callable[[], worker_pb2.SequenceOutput | None]


class FleetTier:
    """Writer, reader, and the requests that wait for a load. Event loop only."""

    def __init__(
        self,
        engine: Engine,
        pool: SharedPool,
        memory: Memory,
        client: KvstoreClient,
        feed: DirectoryFeed,
        member: Member,
        security: Security,
        *,
        hash_key: bytes,
        tokens_min: int,
        deliver: Callable[[worker_pb2.SequenceOutput], None],
    ) -> None:
        """`deliver` takes what becomes of a request that could not begin."""
        self.client = TierClient(client.connection, open_channel=security.open_channel, metadata=security.metadata)
        layout = tier_layout(
            dtype=member.dtype,
            layout=member.layout,
            block_tokens=member.block_tokens,
            width=member.width,
            payload_bytes=pool.payload_bytes,
        )
        self.writer = TierWriter(engine, pool, memory, self.client, layout)
        self.reader = TierReader(
            engine,
            pool,
            self.client,
            layout,
            held=feed.held,
            block_tokens=member.block_tokens,
            hash_key=hash_key,
            model_identity=member.model_identity,
            tokens_min=tokens_min,
        )
        self._deliver = deliver
        self._waiting: dict[int, asyncio.Task[None]] = {}

    def begin(self, request: EngineRequest, start: Start) -> None:
        """Load what the tier has of its prompt, then `start` it."""
        task = asyncio.create_task(self._begin(request, start), name=f"load for {request.sequence_id}")
        self._waiting[request.sequence_id] = task
        task.add_done_callback(lambda _: self._waiting.pop(request.sequence_id, None))

    async def _begin(self, request: EngineRequest, start: Start) -> None:
        await self.reader.load(request)
        if (refusal := start()) is not None:
            self._deliver(refusal)

    def abort(self, sequence_id: int) -> bool:
        """The client gave up. False: it has begun."""
        task = self._waiting.pop(sequence_id, None)
        if task is None or task.done():
            return False
        task.cancel()
        self._deliver(worker_pb2.SequenceOutput(id=sequence_id, finish=worker_pb2.FINISH_ABORT))
        return True

    async def close(self) -> None:
        """Until nothing of the tier touches the pool. The engine is still there."""
        for task in list(self._waiting.values()):
            task.cancel()
        await self.writer.stop()
        await self.reader.close()
        await self.client.close()

    def add_metrics(self, page: Page) -> None:
        """For /metrics."""
        page.add("tier_blocks_waiting", "gauge", "sealed blocks that wait for the tier", {"": self.writer.waiting})
        writes = {f'end="{end}"': float(count) for end, count in self.writer.counts.items()}
        page.add("tier_blocks_total", "counter", "sealed blocks written behind, by what became of them", writes)
        ends = {f'end="{end}"': float(n) for end, n in self.reader.counts.items() if end != "tokens"}
        page.add("tier_loads_total", "counter", "prefixes asked of the tier, by how it ended", ends)
        tokens = {"": float(self.reader.counts["tokens"])}
        page.add("tier_tokens_loaded_total", "counter", "tokens loaded instead of computed", tokens)

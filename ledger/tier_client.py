"""The block tier of the active kvstore, for a worker.

    tier = TierClient(client.connection, open_channel=security.open_channel, metadata=security.metadata)
    await tier.put(Block(block_hash, layout, payload))
    block = await tier.get(block_hash, layout)          # None: not there, not reachable, or not what was written

On a channel of its own: megabytes of blocks delay no transition. Every call has a deadline, and a bound on how many are
open; a tier that does not answer is an empty tier.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import grpc

from tokenrelay.base.logging import get_logger
from tokenrelay.ledger.api import Block, Code, Rejection
from tokenrelay.ledger.connection import Connection, OpenChannel
from tokenrelay.ledger.tier_files import checksum
from tokenrelay.ledger.wire import pack_hashes, unpack_rejection
from tokenrelay.proto import kvstore_pb2 as pb
from tokenrelay.proto import kvstore_pb2_grpc

log = get_logger("tier-client")

CALLS_MAX = 64


class TierClient:
    """Implements `Tier`. One event loop."""

    def __init__(
        self,
        connection: Connection,
        *,
        open_channel: OpenChannel = grpc.aio.insecure_channel,
        metadata: tuple[tuple[str, str], ...] = (),
        timeout_s: float = 5.0,
    ) -> None:
        """`connection` knows which kvstore is the active one."""
        self.counts: Counter[str] = Counter()
        self._connection = connection
        self._open_channel = open_channel
        self._metadata = metadata
        self._timeout_s = timeout_s
        self._open = 0
        self._target = ""
        self._channel: grpc.aio.Channel | None = None
        self._stub: Any = None

    async def close(self) -> None:
        """Close the channel."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    async def put(self, block: Block) -> Rejection | None:
        """See `Tier`."""
        digest = await asyncio.to_thread(checksum, block.payload)
        request = pb.PutBlockRequest(
            block_hash=block.block_hash, layout=block.layout, payload=block.payload, checksum=digest
        )
        reply = await self._call("PutBlock", request)
        if reply is None:
            return Rejection(Code.UNAVAILABLE, "the tier did not answer")
        return unpack_rejection(reply.rejection) if reply.HasField("rejection") else None

    async def get(self, block_hash: bytes, layout: str) -> Block | None:
        """See `Tier`."""
        reply = await self._call("GetBlock", pb.GetBlockRequest(block_hash=block_hash, layout=layout))
        if reply is None or not reply.found:
            return None
        if await asyncio.to_thread(checksum, reply.payload) != reply.checksum:
            self.counts["corrupt"] += 1
            log.error("a block came with another checksum than it was written with", block_hash=block_hash.hex())
            return None
        return Block(block_hash, layout, reply.payload)

    async def contains(self, block_hashes: Sequence[bytes], layout: str) -> int:
        """See `Tier`."""
        request = pb.CountBlocksRequest(block_hashes=pack_hashes(block_hashes), layout=layout)
        reply = await self._call("CountBlocks", request)
        return 0 if reply is None else min(len(block_hashes), reply.count)

    async def _call(self, method: str, request: Any) -> Any:
        """The reply, None when there is none."""
        if self._open >= CALLS_MAX or not self._connection.target:
            self.counts["refused"] += 1
            return None
        if self._target != self._connection.target:
            former, self._target = self._channel, self._connection.target
            self._channel = self._open_channel(self._target)
            self._stub = kvstore_pb2_grpc.KvstoreStub(self._channel)  # type: ignore[no-untyped-call]
            if former is not None:
                await former.close()
        self._open += 1
        try:
            return await getattr(self._stub, method)(request, metadata=self._metadata, timeout=self._timeout_s)
        except (grpc.aio.AioRpcError, grpc.aio.UsageError) as error:
            self.counts["failed"] += 1
            log.debug("the tier did not answer", method=method, error=str(error))
            return None
        finally:
            self._open -= 1

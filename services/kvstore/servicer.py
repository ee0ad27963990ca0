"""`tokenrelay.v1.Kvstore` over a store: sessions, the directory's streams, the tier's blocks."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from tokenrelay.base.logging import get_logger
from tokenrelay.base.version import version
from tokenrelay.ledger.api import Block, Code, DirectoryNotice, Holding, Rejection
from tokenrelay.ledger.wire import ACTIVE_KVSTORE_KEY, Malformed, pack_actor, pack_events, pack_rejection, unpack_hashes
from tokenrelay.proto import kvstore_pb2 as pb
from tokenrelay.proto import kvstore_pb2_grpc
from tokenrelay.services.kvstore.session import Client, Session
from tokenrelay.services.kvstore.store import Store

log = get_logger("kvstore")

CLIENTS_KEPT = 2048
HELLO_TIMEOUT_S = 5.0
PAGES_MAX = 256  # of one message
_NO_TIER = Rejection(Code.FULL, "this kvstore keeps no blocks")
_CHANGED = Rejection(Code.INVALID, "the payload's checksum is another one than was sent")


class KvstoreServicer(kvstore_pb2_grpc.KvstoreServicer):
    """Serves the store. Event loop only."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._clients: OrderedDict[str, Client] = OrderedDict()
        self._sessions: set[Session] = set()
        self._draining = ""

    @property
    def sessions_open(self) -> int:
        """Clients that are connected."""
        return len(self._sessions)

    def end_sessions(self, reason: str) -> None:
        """Send the clients elsewhere."""
        for session in self._sessions:
            session.end(reason)

    def drain(self, reason: str) -> None:
        """Take no session any more, and end the open ones: their clients attach to who takes over."""
        self._draining = reason
        self.end_sessions(reason)

    # -- sessions -----------------------------------------------------------------------------------------------------
    async def Session(self, request_iterator: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Calls of one client, until either side ends."""
        await self._refuse_unless_active(context)
        hello = await self._hello(context)
        client = self._clients.get(hello.client)
        resumed = client is not None
        if client is None:
            self._store.raise_term(hello.term_seen)
            client = self._clients[hello.client] = Client()
            if len(self._clients) > CLIENTS_KEPT:
                self._forget_a_client()
        self._clients.move_to_end(hello.client)
        if client.session is not None:
            client.session.close()
        session = client.session = Session(self._store, client)
        self._sessions.add(session)
        welcome = pb.KvWelcome(
            incarnation=self._store.incarnation, term=self._store.host.term, version=version(), resumed=resumed
        )
        tasks: list[asyncio.Task[None]] = []
        try:
            await context.write(pb.KvReplies(welcome=welcome))
            tasks = [asyncio.create_task(work) for work in (session.read(context), session.write(context))]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            reason = session.over
            session.close()
            self._sessions.discard(session)
            for task in tasks:
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(result, DecodeError):
                    self._store.malformed["unreadable"] += 1
                    reason = reason or f"a message that cannot be read: {result}"
                elif isinstance(result, Exception):
                    log.error("a session failed", client=hello.client, error=repr(result))
        if reason:
            await context.abort(grpc.StatusCode.UNAVAILABLE, reason)

    def _forget_a_client(self) -> None:
        for name, client in self._clients.items():
            if client.session is None:
                del self._clients[name]
                return
        self._clients.popitem(last=False)

    async def _refuse_unless_active(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        if self._draining:
            await context.abort(grpc.StatusCode.UNAVAILABLE, self._draining)
        if not self._store.active:
            where = self._store.active_address()
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"this kvstore is a standby{f'; the active one is {where}' if where else ''}",
                trailing_metadata=((ACTIVE_KVSTORE_KEY, where),) if where else (),
            )

    async def _hello(self, context: grpc.aio.ServicerContext[Any, Any]) -> pb.KvHello:
        try:
            message = await asyncio.wait_for(context.read(), HELLO_TIMEOUT_S)
        except (TimeoutError, DecodeError):
            message = None
        if not isinstance(message, pb.KvCalls) or not message.hello.client or len(message.hello.client) > 64:
            self._store.malformed["hello"] += 1
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a session begins with a hello that names the client")
        assert isinstance(message, pb.KvCalls)
        return message.hello

    # -- the directory ------------------------------------------------------------------------------------------------
    async def Follow(
        self, request: pb.FollowRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.HoldingPages]:
        """Everything known, then every change."""
        await self._refuse_unless_active(context)
        async for notices in self._store.directory.follow_batches():
            for at in range(0, len(notices), PAGES_MAX):
                yield pb.HoldingPages(pages=map(_pack_page, notices[at : at + PAGES_MAX]))

    # -- the tier -----------------------------------------------------------------------------------------------------
    async def PutBlock(self, request: pb.PutBlockRequest, context: Any) -> pb.PutBlockReply:
        """Keep a block, if its bytes are those that were sent and there is room."""
        tier = self._store.tier
        if tier is None:
            return pb.PutBlockReply(rejection=pack_rejection(_NO_TIER))
        digest = await tier.digest(request.payload)
        if digest != request.checksum:
            self._store.malformed["put_block"] += 1
            return pb.PutBlockReply(rejection=pack_rejection(_CHANGED))
        rejection = tier.keep(Block(request.block_hash, request.layout, request.payload), digest)
        return pb.PutBlockReply(rejection=None if rejection is None else pack_rejection(rejection))

    async def GetBlock(self, request: pb.GetBlockRequest, context: Any) -> pb.GetBlockReply:
        """A block with its checksum, for the reader to compare."""
        tier = self._store.tier
        found = None if tier is None else await tier.fetch(request.block_hash, request.layout)
        if found is None:
            return pb.GetBlockReply(found=False)
        return pb.GetBlockReply(found=True, payload=found[0].payload, checksum=found[1])

    async def CountBlocks(self, request: pb.CountBlocksRequest, context: Any) -> pb.CountBlocksReply:
        """How many blocks of a prompt are here, from its start on."""
        tier = self._store.tier
        try:
            hashes = unpack_hashes(request.block_hashes)
        except Malformed:
            self._store.malformed["count_blocks"] += 1
            hashes = []
        return pb.CountBlocksReply(count=0 if tier is None else await tier.contains(hashes, request.layout))

    # -- status -------------------------------------------------------------------------------------------------------
    async def GetStatus(self, request: pb.KvStatusRequest, context: Any) -> pb.KvStatus:
        """For people, scrapes and tests; standbys answer too."""
        return self.status()

    def status(self) -> pb.KvStatus:
        """How things stand."""
        store = self._store
        refusal = store.host.refusal()
        if not store.active:
            role = "standby"
        elif store.attach is not None:
            role = "recovering"
        else:
            role = "active" if refusal is None else "suspended"
        return pb.KvStatus(
            incarnation=store.incarnation,
            role=role,
            backend=store.backend,
            term=store.host.term,
            members=len(store.host.roster.members()),
            handles_open=store.host.books.open_count,
            active_address=store.active_address(),
            reason="" if refusal is None else refusal.reason,
        )


def _pack_page(notice: DirectoryNotice) -> pb.HoldingPage:
    if not isinstance(notice, Holding):
        return pb.HoldingPage(actor=pb.KvActor(name=notice.name), ended=True)
    kinds, hashes = pack_events(notice.events)
    return pb.HoldingPage(
        actor=pack_actor(notice.actor),
        sequence=notice.sequence,
        kinds=kinds,
        block_hashes=hashes,
        replaces=notice.replaces,
    )

"""A kvstore's session made by hand, and calls to send over it."""

from __future__ import annotations

import contextlib

import grpc
from kv_fleet import member

from tokenrelay.ledger.wire import pack_actor, pack_member
from tokenrelay.proto import kvstore_pb2 as pb

PREFILL = member("prefill", role="prefill")


class RawSession:
    """A session made by hand: what it sends need not be what a client sends."""

    def __init__(self, address: str, metadata: tuple[tuple[str, str], ...] = ()) -> None:
        self.channel = grpc.aio.insecure_channel(address)
        method = self.channel.stream_stream(
            "/tokenrelay.v1.Kvstore/Session",
            request_serializer=lambda data: data,
            response_deserializer=pb.KvReplies.FromString,
        )
        self.call = method(metadata=metadata)

    async def send(self, message: pb.KvCalls) -> None:
        await self.call.write(message.SerializeToString())

    async def hello(self, client: str = "raw") -> pb.KvWelcome:
        await self.send(pb.KvCalls(hello=pb.KvHello(client=client)))
        return (await self.call.read()).welcome

    async def ask(self, *calls: pb.KvCall) -> list[pb.KvReply]:
        await self.send(pb.KvCalls(calls=calls))
        replies: list[pb.KvReply] = []
        while len(replies) < len(calls):
            replies += (await self.call.read()).replies
        return replies

    async def status(self) -> grpc.StatusCode:
        with contextlib.suppress(grpc.aio.AioRpcError):
            while await self.call.read() is not grpc.aio.EOF:
                pass
        return await self.call.code()

    async def close(self) -> None:
        self.call.cancel()
        await self.channel.close()


def join_call(number: int, lease_ms: int = 30_000) -> pb.KvCall:
    return pb.KvCall(number=number, join=pb.KvJoin(member=pack_member(PREFILL), lease_ms=lease_ms))


def reserve_call(number: int) -> pb.KvCall:
    return pb.KvCall(
        number=number, reserve=pb.KvReserve(owner=pack_actor(PREFILL.actor), extents=1, deadline_ms=30_000)
    )

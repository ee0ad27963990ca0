"""The gRPC transport's wire: what forged requests are answered, and what forged answers lead to."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import msgspec
import numpy as np
import pytest
from pools import Pool, layout
from transfer_stage import Stage

from tokenrelay.base.deadlines import Deadline
from tokenrelay.base.errors import HandshakeRefused, Overloaded, TransferFailed
from tokenrelay.proto import transfer_pb2, transfer_pb2_grpc
from tokenrelay.transfer import stream, transport
from tokenrelay.transfer.runs import Span
from tokenrelay.transfer.transport import Endpoint, Identity, Transport


@pytest.fixture
def kind() -> str:
    """Only this one."""
    return "stream"


def soon() -> Deadline:
    """Long enough for a loaded machine."""
    return Deadline.after(10)


def packed(*numbers: int) -> bytes:
    """As the wire has them."""
    return np.array(numbers, dtype="<i8").tobytes()


class Raw:
    """A reader that says what it likes."""

    def __init__(self, owner: Transport) -> None:
        self._channel = grpc.aio.insecure_channel(Endpoint.decode(owner.endpoint()).address)
        self._stub: Any = transfer_pb2_grpc.TransferStub(self._channel)  # type: ignore[no-untyped-call]
        self._call: Any = None

    async def attach(self) -> bytes:
        """The session."""
        request = transfer_pb2.AttachRequest(version=1, name="decode-9", incarnation="9")
        request.layout.CopyFrom(stream._layout_message(layout()))
        self._call = self._stub.Attach(request)
        return bytes((await self._call.read()).session)

    async def pull(self, **fields: bytes) -> int:
        """Bytes that came."""
        return sum([len(chunk.data) async for chunk in self._stub.Pull(transfer_pb2.PullRequest(**fields))])

    async def generations(self, **fields: bytes) -> bytes:
        """Words."""
        return bytes((await self._stub.Generations(transfer_pb2.GenerationsRequest(**fields))).words)

    async def close(self) -> None:
        """Goodbye."""
        await self._channel.close()


@pytest.fixture
async def owner(stage: Stage) -> Transport:
    """3 layers of 16 blocks."""
    return await stage.transport(Pool(layout(), 16), "prefill-0")


@pytest.fixture
async def raw(owner: Transport) -> AsyncIterator[Raw]:
    """Not attached yet."""
    found = Raw(owner)
    yield found
    await found.close()


async def test_a_session_that_was_not_given_opens_nothing(owner: Transport, raw: Raw) -> None:
    await raw.attach()
    for session in (b"", b"x" * 16, b"x" * 100):
        for call in (
            raw.pull(session=session, layers=packed(0), blocks=packed(0), counts=packed(1)),
            raw.generations(session=session, blocks=packed(0)),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call
            assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert owner.metrics.value("transfer_refused_total", 'transport="stream",reason="fenced"') == 6


@pytest.mark.parametrize(
    "fields",
    [
        {"layers": packed(0), "blocks": packed(0), "counts": packed(17)},
        {"layers": packed(0), "blocks": packed(15), "counts": packed(2)},
        {"layers": packed(0), "blocks": packed(-1), "counts": packed(1)},
        {"layers": packed(0), "blocks": packed(0), "counts": packed(0)},
        {"layers": packed(0), "blocks": packed(0), "counts": packed(-1)},
        {"layers": packed(3), "blocks": packed(0), "counts": packed(1)},
        {"layers": packed(-1), "blocks": packed(0), "counts": packed(1)},
        {"layers": packed(0), "blocks": packed((1 << 63) - 1), "counts": packed(1)},
        {"layers": packed(0), "blocks": packed(1), "counts": packed((1 << 63) - 1)},
        {"layers": packed(0, 1), "blocks": packed(0), "counts": packed(1)},
        {"layers": b"abc", "blocks": packed(0), "counts": packed(1)},
    ],
)
async def test_runs_outside_the_pool_are_refused(owner: Transport, raw: Raw, fields: dict[str, bytes]) -> None:
    session = await raw.attach()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await raw.pull(session=session, **fields)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert owner.metrics.value("transfer_refused_total", 'transport="stream",reason="corrupt"') == 1
    assert await raw.pull(session=session, layers=packed(2, 0), blocks=packed(15, 0), counts=packed(1, 16)) == (
        1536 + 16 * 4096
    )


@pytest.mark.parametrize("blocks", [packed(16), packed(-1), b"abc"])
async def test_generations_outside_the_pool_are_refused(owner: Transport, raw: Raw, blocks: bytes) -> None:
    session = await raw.attach()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await raw.generations(session=session, blocks=blocks)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_peers_and_pulls_have_a_bound(stage: Stage, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, reader = await stage.transport(Pool(layout(), 16), "prefill-0"), await stage.transport(pool)
    await reader.connect(owner.endpoint(), soon())
    monkeypatch.setattr(transport, "PEERS_MAX", 1)
    with pytest.raises(Overloaded, match="serves 1 peers already"):
        await reader.connect(owner.endpoint(), soon())


class Forged(transfer_pb2_grpc.TransferServicer):
    """An owner that answers with these chunks and words."""

    def __init__(self, chunks: list[Any], words: bytes = b"", extra: bool = False) -> None:
        self._chunks, self._words, self._extra = chunks, words, extra

    async def Attach(self, request: Any, context: Any) -> AsyncIterator[Any]:
        reply = transfer_pb2.AttachReply(session=b"s" * 16, name="prefill-0", incarnation="1", blocks=16)
        reply.layout.CopyFrom(request.layout)
        yield reply
        if self._extra:
            yield reply
        await asyncio.sleep(60)

    async def Pull(self, request: Any, context: Any) -> AsyncIterator[Any]:
        for chunk in self._chunks:
            yield chunk

    async def Generations(self, request: Any, context: Any) -> Any:
        return transfer_pb2.GenerationsReply(words=self._words)


async def forged(folder: str, servicer: Forged) -> tuple[grpc.aio.Server, bytes]:
    """Its server, and an endpoint."""
    server = grpc.aio.server()
    transfer_pb2_grpc.add_TransferServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    server.add_insecure_port(f"unix:{folder}/forged")
    await server.start()
    return server, msgspec.msgpack.encode(Endpoint("stream", f"unix:{folder}/forged", Identity("prefill-0", "1")))


def chunk(data: bytes, crc32: int | None = None) -> Any:
    """One message."""
    return transfer_pb2.Chunk(data=data, checked=crc32 is not None, crc32=crc32 or 0)


@pytest.mark.parametrize(
    ("chunks", "told"),
    [
        ([], "ended 4096 bytes early"),
        ([chunk(b"x" * 4095)], "ended 1 bytes early"),
        ([chunk(b"x" * 4097)], "sent 4097 bytes where 4096 were left"),
        ([chunk(b"x" * 4096), chunk(b"y")], "sent 1 bytes where 0 were left"),
        ([chunk(b"x" * 4096, 7)], "has another checksum"),
        ([chunk(b""), chunk(b"x" * 4096)], "sent 0 bytes"),
    ],
)
async def test_answers_of_another_length_are_corrupt(
    stage: Stage, pool: Pool, folder: str, chunks: list[Any], told: str
) -> None:
    server, endpoint = await forged(folder, Forged(chunks))
    reader = await stage.transport(pool)
    connection = await reader.connect(endpoint, soon())
    with pytest.raises(TransferFailed, match=told) as failed:
        await connection.pull([Span(0, 1, [3], [3])], soon())
    assert failed.value.reason == "corrupt"
    assert all(pool.untouched(layer, block) for layer in range(3) for block in range(48) if (layer, block) != (0, 3))
    with pytest.raises(TransferFailed, match="0 bytes of generations"):
        await connection.validate([3], [0], soon())
    await server.stop(0)


async def test_a_second_admission_breaks_the_connection(stage: Stage, pool: Pool, folder: str) -> None:
    server, endpoint = await forged(folder, Forged([], extra=True))
    connection = await (await stage.transport(pool)).connect(endpoint, soon())
    with pytest.raises(TransferFailed):
        while True:
            await connection.validate([], [], soon())
    assert connection.broken is not None
    assert connection.broken.reason == "corrupt"
    await server.stop(0)


async def test_checksums_are_sent_where_asked_for(pool: Pool, folder: str) -> None:
    owner = stream.StreamTransport(
        Identity("prefill-0", "1"), Pool(layout(), 16).memory, listen=f"unix:{folder}/owner", checksums=True
    )
    await owner.open()
    raw = Raw(owner)
    session = await raw.attach()
    request = transfer_pb2.PullRequest(session=session, layers=packed(0), blocks=packed(0), counts=packed(1))
    found = [message async for message in raw._stub.Pull(request)]
    assert [message.crc32 for message in found] == [zlib.crc32(message.data) for message in found]
    assert found[0].checked
    await raw.close()
    await owner.close()


async def test_over_tcp(stage: Stage, pool: Pool) -> None:
    owner = await stage.transport(Pool(layout(), 16), "prefill-0", listen="127.0.0.1:0")
    assert not Endpoint.decode(owner.endpoint()).address.endswith(":0")
    reader = await stage.transport(pool)
    connection = await reader.connect(owner.endpoint(), soon())
    await connection.pull([Span(0, 3, [1], [1])], soon())
    with pytest.raises(HandshakeRefused, match="not a transfer endpoint"):
        await reader.connect(b"", soon())

"""Plain gRPC streaming (proto/transfer.proto): works wherever a TCP or Unix connection does.

The owner reads its own memory, so a fence needs nothing of the reader: calls of that incarnation are refused and
those under way have ended when it returns. What was sent before is told apart by its generation, asked for last.
HTTP/2 flow control bounds what is under way; a reader that does not read holds one chunk in the owner's memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import secrets
import zlib
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from tokenrelay.base.deadlines import Deadline
from tokenrelay.base.errors import (
    ConfigError,
    DeadlineExceeded,
    HandshakeRefused,
    Overloaded,
    TokenRelayError,
    TransferFailed,
)
from tokenrelay.proto import transfer_pb2, transfer_pb2_grpc
from tokenrelay.transfer.memory import Layout, Memory, Words
from tokenrelay.transfer.metrics import Metrics
from tokenrelay.transfer.runs import RUNS_MAX, Runs
from tokenrelay.transfer.security import MESSAGE_OPTIONS, SERVER_OPTIONS, Open, Security
from tokenrelay.transfer.transport import Connection, Identity, Proof, Transport

VERSION = 1
CHUNK_BYTES = 1 << 20
PULLS_PER_PEER_MAX = 64
_CODES = {
    grpc.StatusCode.PERMISSION_DENIED: "fenced",
    grpc.StatusCode.UNAVAILABLE: "peer_gone",
    grpc.StatusCode.CANCELLED: "peer_gone",
}


class _Session:
    """A reader that is attached."""

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self.ended = asyncio.Event()
        self.pulls: set[asyncio.Task[Any]] = set()


class StreamTransport(Transport):
    """Serves a Memory in host memory over gRPC."""

    kind = "stream"

    def __init__(
        self,
        identity: Identity,
        memory: Memory,
        *,
        listen: str,
        token: str = "",
        security: Security | None = None,
        metrics: Metrics | None = None,
        advertise: str = "",
        checksums: bool = False,
    ) -> None:
        """`checksums`: the owner adds a CRC-32 to each chunk (about 1 GB/s); readers check what has one."""
        if any(region.device is not None for region in memory.regions):
            raise ConfigError("the stream transport reads host memory only")
        super().__init__(identity, memory, metrics, advertise)
        self._listen = listen
        self._security: Security = security or Open()
        self.metadata = self._security.metadata or ((("authorization", f"Bearer {token}"),) if token else ())
        self._checksums = checksums
        self._server: grpc.aio.Server | None = None
        self._address = listen
        self._sessions: dict[bytes, _Session] = {}

    async def open(self) -> None:
        """Listen. Raises ConfigError that names the address."""
        server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=self._security.interceptors())
        transfer_pb2_grpc.add_TransferServicer_to_server(_Servicer(self), server)  # type: ignore[no-untyped-call]
        try:
            port = self._security.add_port(server, self._listen)
            await server.start()
        except (RuntimeError, OSError) as error:
            raise ConfigError(f"cannot listen on {self._listen} for transfers: {error}") from error
        if not self._listen.startswith("unix:"):
            self._address = f"{self._listen.rpartition(':')[0]}:{port}"
        self._server = server

    def endpoint(self) -> bytes:
        """For a peer's `connect`; it names this incarnation."""
        return self.endpoint_at(self._address)

    def peers(self) -> list[Identity]:
        """Who is attached."""
        return [session.identity for session in self._sessions.values()]

    async def connect(self, endpoint: bytes, deadline: Deadline) -> StreamConnection:
        """Attach. Raises HandshakeRefused, Overloaded, DeadlineExceeded or TransferFailed."""
        wanted = self.wanted(endpoint)
        channel = self._security.open_channel(wanted.address)
        stub = transfer_pb2_grpc.TransferStub(channel)  # type: ignore[no-untyped-call]
        request = transfer_pb2.AttachRequest(
            version=VERSION,
            name=self.identity.name,
            incarnation=self.identity.incarnation,
            layout=_layout_message(self.memory.layout),
        )
        call = stub.Attach(request, metadata=self.metadata)
        try:
            reply = await asyncio.wait_for(call.read(), _timeout(deadline))
            if reply is grpc.aio.EOF:
                raise TransferFailed(f"{wanted.identity.name} ended the handshake", reason="peer_gone")
            self.check_incarnation(wanted.identity, Identity(reply.name, reply.incarnation))
            self.memory.layout.check(self.identity.name, _layout_of(reply.layout), reply.name)
            if len(reply.session) != 16 or not reply.blocks:
                raise TransferFailed(f"{reply.name} admits without a session or blocks", reason="corrupt")
        except BaseException as error:
            call.cancel()
            await channel.close()
            if isinstance(error, grpc.aio.AioRpcError):
                raise _translated(error, wanted.identity.name) from error
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded(f"{wanted.identity.name} did not answer in time") from None
            raise
        connection = StreamConnection(self, channel, stub, call, reply)
        self.remember(connection)
        return connection

    async def _cut_off(self, incarnation: str, deadline: Deadline, kill: bool) -> Proof:
        sessions = [s for s in self._sessions.values() if s.identity.incarnation == incarnation]
        pulls = [pull for session in sessions for pull in session.pulls]
        for session in sessions:
            session.ended.set()
        for pull in pulls:
            pull.cancel()
        if pulls:
            _, pending = await asyncio.wait(pulls, timeout=_timeout(deadline))
            if pending:
                raise DeadlineExceeded(f"{len(pending)} pulls of {incarnation} have not ended yet")
        return Proof.REVOKED if sessions else Proof.ABSENT

    async def _shut(self) -> None:
        server, self._server = self._server, None
        for session in list(self._sessions.values()):
            session.ended.set()
        if server is not None:
            await server.stop(0)
            if self._listen.startswith("unix:"):
                _unlink(Path(self._listen.removeprefix("unix:")))

    # The owner's side, called by the servicer.

    def attach(self, request: Any) -> tuple[_Session, Any]:
        """Let a reader in. Raises an error of the tree."""
        identity = Identity(request.name, request.incarnation)
        if request.version != VERSION:
            raise HandshakeRefused(
                f"transfer protocol: {self.identity.name} has stream {VERSION}, {identity.name} has {request.version}"
            )
        refusal = self.refusal(identity, _layout_of(request.layout), len(self._sessions))
        if refusal is not None:
            raise refusal
        session, name = _Session(identity), secrets.token_bytes(16)
        self._sessions[name] = session
        return session, transfer_pb2.AttachReply(
            session=name,
            name=self.identity.name,
            incarnation=self.identity.incarnation,
            layout=_layout_message(self.memory.layout),
            blocks=self.memory.blocks,
        )

    def detach(self, name: bytes) -> None:
        """Its stream ended; pulls of it end as well."""
        session = self._sessions.pop(name)
        for pull in session.pulls:
            pull.cancel()

    def session(self, name: bytes) -> _Session:
        """Raises TransferFailed: fenced, or never attached."""
        session = self._sessions.get(name)
        if session is None or session.ended.is_set():
            raise TransferFailed("no such attachment: it ended, was fenced, or never was", reason="fenced")
        return session

    def chunks(self, request: Any) -> Iterator[Any]:
        """The data asked for. Raises TransferFailed for extents that are not there."""
        layers, first, counts = (_numbers(name, getattr(request, name)) for name in ("layers", "blocks", "counts"))
        regions = self.memory.regions
        inside = len(layers) == len(first) == len(counts) <= RUNS_MAX and (
            not len(layers)
            or bool(
                layers.min() >= 0
                and layers.max() < len(regions)
                and first.min() >= 0
                and counts.min() > 0
                and counts.max() <= self.memory.blocks
                and first.max() <= self.memory.blocks
                and (first + counts).max() <= self.memory.blocks
            )
        )
        if not inside:
            raise TransferFailed("the runs asked for are not in the pool", reason="corrupt")
        return self._chunks(layers.tolist(), first.tolist(), counts.tolist())

    def _chunks(self, layers: list[int], first: list[int], counts: list[int]) -> Iterator[Any]:
        parts: list[bytes] = []
        size = 0
        for layer, block, count in zip(layers, first, counts, strict=True):
            for address, length in _pieces(self.memory, layer, block, count):
                start = 0
                while start < length:
                    take = min(length - start, CHUNK_BYTES - size)
                    parts.append(ctypes.string_at(address + start, take))
                    start, size = start + take, size + take
                    if size == CHUNK_BYTES:
                        yield self._chunk(parts)
                        parts, size = [], 0
        if size:
            yield self._chunk(parts)

    def _chunk(self, parts: list[bytes]) -> Any:
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        checked = self._checksums
        return transfer_pb2.Chunk(data=data, checked=checked, crc32=zlib.crc32(data) if checked else 0)


class _Servicer(transfer_pb2_grpc.TransferServicer):
    def __init__(self, transport: StreamTransport) -> None:
        self._transport = transport

    async def Attach(self, request: Any, context: Any) -> AsyncIterator[Any]:
        transport = self._transport
        try:
            session, reply = transport.attach(request)
        except TokenRelayError as error:
            transport.metrics.refused(transport.kind, error.code)
            full = isinstance(error, Overloaded)
            code = grpc.StatusCode.RESOURCE_EXHAUSTED if full else grpc.StatusCode.FAILED_PRECONDITION
            await context.abort(code, error.message)
            return
        try:
            yield reply
            await session.ended.wait()
        finally:
            transport.detach(reply.session)
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"{transport.identity.name} has fenced this process")

    async def Pull(self, request: Any, context: Any) -> None:
        """Written and not yielded: the task must be cancellable by a fence between two chunks."""
        transport, task = self._transport, asyncio.current_task()
        assert task is not None
        try:
            session = transport.session(request.session)
            if len(session.pulls) >= PULLS_PER_PEER_MAX:
                raise Overloaded(f"{len(session.pulls)} pulls of {session.identity.name} are under way")
            chunks = transport.chunks(request)
        except TokenRelayError as error:
            await self._refuse(context, error)
            return
        work = asyncio.create_task(_write(context, chunks, session.ended), name="transfer-pull")
        session.pulls.add(work)
        try:
            await asyncio.wait([work])
        finally:
            work.cancel()
            session.pulls.discard(work)
        if work.cancelled() or session.ended.is_set():
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "fenced")
        work.result()

    async def Generations(self, request: Any, context: Any) -> Any:
        transport = self._transport
        try:
            transport.session(request.session)
            try:
                words = transport.memory.words(_numbers("blocks", request.blocks))
            except IndexError as error:
                raise TransferFailed(f"generations of {error}", reason="corrupt") from error
        except TokenRelayError as error:
            await self._refuse(context, error)
            return None
        return transfer_pb2.GenerationsReply(words=words.astype("<u8").tobytes())

    async def _refuse(self, context: Any, error: TokenRelayError) -> None:
        transport, reason = self._transport, getattr(error, "reason", error.code)
        transport.metrics.refused(transport.kind, reason)
        codes = {"fenced": grpc.StatusCode.PERMISSION_DENIED, "overloaded": grpc.StatusCode.RESOURCE_EXHAUSTED}
        await context.abort(codes.get(reason, grpc.StatusCode.INVALID_ARGUMENT), error.message)


async def _write(context: Any, chunks: Iterator[Any], ended: asyncio.Event) -> None:
    for chunk in chunks:
        await context.write(chunk)
        if ended.is_set():
            return


class StreamConnection(Connection):
    """An attachment to a peer's server."""

    def __init__(self, transport: StreamTransport, channel: grpc.aio.Channel, stub: Any, call: Any, reply: Any) -> None:
        super().__init__(transport, Identity(reply.name, reply.incarnation), reply.blocks)
        self._metadata = transport.metadata
        self._channel, self._stub, self._call = channel, stub, call
        self._name: bytes = reply.session
        self._under_way: set[Any] = set()
        self._watch = asyncio.create_task(self._until_the_end(), name="transfer-attachment")

    async def _until_the_end(self) -> None:
        try:
            extra = await self._call.read()
        except grpc.aio.AioRpcError as error:
            failure = _translated(error, self.peer.name)
            if not isinstance(failure, TransferFailed):
                failure = TransferFailed(failure.message, reason="transport")
        else:
            told = "ended the attachment" if extra is grpc.aio.EOF else "sent a second AttachReply"
            reason = "peer_gone" if extra is grpc.aio.EOF else "corrupt"
            failure = TransferFailed(f"{self.peer.name} {told}", reason=reason)
        self._break(failure)
        for call in list(self._under_way):
            call.cancel()

    async def _read(self, runs: Runs, deadline: Deadline) -> None:
        packed = {
            name: column.astype("<i8").tobytes()
            for name, column in (("layers", runs.layers), ("blocks", runs.remote), ("counts", runs.blocks))
        }
        if sum(map(len, packed.values())) > MESSAGE_OPTIONS[0][1] // 2:
            raise ValueError(f"{len(runs)} runs do not fit into one request: ask for less at once")
        call = self._stub.Pull(
            transfer_pb2.PullRequest(session=self._name, **packed),
            metadata=self._metadata,
            timeout=_timeout(deadline),
        )
        self._under_way.add(call)
        target = _Target(self.transport.memory, runs, self.peer.name)
        try:
            async for chunk in call:
                if self._broken is not None:  # nothing is written after `settled`
                    raise self._broken
                target.take(chunk)
            target.check()
        except grpc.aio.AioRpcError as error:
            raise self._failure(error) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._broken is not None and task is not None and not task.cancelling():
                raise self._broken from None  # the call was cancelled, not the pull
            raise
        finally:
            self._under_way.discard(call)
            call.cancel()

    async def _words(self, blocks: npt.NDArray[np.int64], deadline: Deadline) -> Words:
        request = transfer_pb2.GenerationsRequest(session=self._name, blocks=blocks.astype("<i8").tobytes())
        try:
            reply = await self._stub.Generations(request, metadata=self._metadata, timeout=_timeout(deadline))
        except grpc.aio.AioRpcError as error:
            raise self._failure(error) from error
        if len(reply.words) != 8 * len(blocks):
            raise TransferFailed(f"{self.peer.name} sent {len(reply.words)} bytes of generations", reason="corrupt")
        return np.frombuffer(reply.words, "<u8").astype(np.uint64)

    def _failure(self, error: grpc.aio.AioRpcError) -> TokenRelayError:
        return self._broken or _translated(error, self.peer.name)

    async def _release(self) -> None:
        for call in list(self._under_way):
            call.cancel()
        self._call.cancel()
        self._watch.cancel()
        await asyncio.wait([self._watch])
        await self._channel.close()


class _Target:
    """Local blocks that take a stream of bytes, in the order of the runs."""

    def __init__(self, memory: Memory, runs: Runs, peer: str) -> None:
        columns = (column.tolist() for column in (runs.layers, runs.local, runs.blocks))
        self._pieces = (piece for run in zip(*columns, strict=True) for piece in _pieces(memory, *run))
        self._left_bytes = runs.bytes(memory.layout.block_bytes)
        self._address = self._room = 0
        self._peer = peer

    def take(self, chunk: Any) -> None:
        """Write it. Raises TransferFailed for more than was asked, and for a checksum that does not fit."""
        data: bytes = chunk.data
        if chunk.checked and zlib.crc32(data) != chunk.crc32:
            raise TransferFailed(f"a chunk of {self._peer} has another checksum", reason="corrupt")
        if not 0 < len(data) <= self._left_bytes:
            raise TransferFailed(
                f"{self._peer} sent {len(data)} bytes where {self._left_bytes} were left", reason="corrupt"
            )
        self._left_bytes -= len(data)
        start = 0
        source = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0
        while start < len(data):
            if not self._room:
                self._address, self._room = next(self._pieces)
            take = min(self._room, len(data) - start)
            ctypes.memmove(self._address, source + start, take)
            start, self._address, self._room = start + take, self._address + take, self._room - take

    def check(self) -> None:
        """Raise TransferFailed unless all came."""
        if self._left_bytes:
            raise TransferFailed(f"{self._peer} ended {self._left_bytes} bytes early", reason="corrupt")


def _pieces(memory: Memory, layer: int, block: int, count: int) -> Iterator[tuple[int, int]]:
    """(address, bytes) of neighbouring blocks: one piece where they touch."""
    region = memory.regions[layer]
    address = region.address + block * region.block_stride
    if region.block_stride == region.block_bytes:
        yield address, count * region.block_bytes
    else:
        for number in range(count):
            yield address + number * region.block_stride, region.block_bytes


def _numbers(name: str, packed: bytes) -> npt.NDArray[np.int64]:
    if len(packed) % 8:
        raise TransferFailed(f"{name} has {len(packed)} bytes, expected packed int64", reason="corrupt")
    return np.frombuffer(packed, "<i8").astype(np.int64)


def _layout_message(layout: Layout) -> Any:
    return transfer_pb2.TransferLayout(
        model_identity=layout.model_identity,
        dtype=layout.dtype,
        block_tokens=layout.block_tokens,
        layout=layout.layout,
        block_bytes=_list(layout.block_bytes),
        parallel_width=layout.parallel_width,
    )


def _list(numbers: Sequence[int]) -> list[int]:
    return list(numbers)


def _layout_of(message: Any) -> Layout:
    return Layout(
        model_identity=message.model_identity,
        dtype=message.dtype,
        block_tokens=message.block_tokens,
        layout=message.layout,
        block_bytes=tuple(message.block_bytes),
        parallel_width=message.parallel_width,
    )


def _timeout(deadline: Deadline) -> float | None:
    left_s = deadline.left_s()
    return None if left_s == float("inf") else left_s


def _translated(error: grpc.aio.AioRpcError, peer: str) -> TokenRelayError:
    """gRPC's statuses in the one error tree."""
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(f"the deadline of a pull from {peer} passed while it was streamed")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return Overloaded(details)
    if code in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNAUTHENTICATED):
        return HandshakeRefused(details)
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return TransferFailed(f"{peer}: {details}", reason="corrupt")
    return TransferFailed(f"{peer}: {details}", reason=_CODES.get(code, "transport"))


def _unlink(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()

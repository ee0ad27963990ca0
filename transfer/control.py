"""The control connection beside a transport in which peers read memory by themselves (shared memory, NIXL).

It introduces the two, and its end is a proof: a reader's process closes it after its last read ended, and the kernel
closes it for a process that died, after it took its memory map away. It has no keepalive, as silence proves nothing.
On a Unix socket the owner also gets a pidfd of the reader, and gives it a gate (gate.py) and other descriptors.

Frames: 4 bytes length, little-endian, then MessagePack of one of the structs below; at most FRAME_BYTES_MAX.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Awaitable, Callable

import msgspec

from tokenrelay.base.deadlines import Deadline
from tokenrelay.base.errors import DeadlineExceeded, HandshakeRefused, Overloaded, TokenRelayError, TransferFailed
from tokenrelay.transfer.memory import Layout
from tokenrelay.transfer.transport import Identity

FRAME_BYTES_MAX = 4 << 20  # NIXL's metadata is some 100 bytes a region
FDS_MAX = 4
VERSION = 1
_LENGTH = struct.Struct("<I")


class Exported(msgspec.Struct, frozen=True, kw_only=True):
    """Where an owner's blocks are. Addresses are offsets in the file for shared memory, the owner's for NIXL."""

    blocks: int
    addresses: tuple[int, ...]  # of each region
    strides: tuple[int, ...]
    generations: int
    devices: tuple[int, ...]  # -1: host memory


class Hello(msgspec.Struct, frozen=True, tag="hello", kw_only=True):
    """A reader's first frame."""

    version: int
    kind: str
    identity: Identity
    layout: Layout
    token: str = ""
    metadata: bytes = b""


class Welcome(msgspec.Struct, frozen=True, tag="welcome", kw_only=True):
    """The owner's answer."""

    identity: Identity
    layout: Layout
    exported: Exported
    metadata: bytes = b""
    fds: int = 0  # that came with this frame


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The owner's other answer; `code` is the error's."""

    code: str
    message: str


class Revoke(msgspec.Struct, frozen=True, tag="revoke"):
    """Owner: stop reading, and say so."""


class Revoked(msgspec.Struct, frozen=True, tag="revoked"):
    """Reader: the last read has ended, none will follow."""


class Active(msgspec.Struct, frozen=True, tag="active"):
    """Reader: reads are under way (or no more), so the owner's side must make progress for them."""

    reading: bool


Frame = Hello | Welcome | Refused | Revoke | Revoked | Active
_decoder: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(Frame)
_encoder = msgspec.msgpack.Encoder()


def encode(frame: Frame) -> bytes:
    """With its length."""
    body = _encoder.encode(frame)
    return _LENGTH.pack(len(body)) + body


def decode(body: bytes) -> Frame:
    """Raises TransferFailed for what no peer of ours sends."""
    try:
        return _decoder.decode(body)
    except msgspec.MsgspecError as error:
        raise TransferFailed(f"not a control frame: {error}", reason="corrupt") from error


async def read_frame(reader: asyncio.StreamReader) -> Frame | None:
    """The next frame; None at the end. Raises TransferFailed for anything else."""
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        _check_length(length)
        return decode(await reader.readexactly(length))
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise TransferFailed("a control frame was cut short", reason="corrupt") from None
        return None
    except ConnectionError:
        return None


def _check_length(length: int) -> None:
    if not 0 < length <= FRAME_BYTES_MAX:
        raise TransferFailed(f"a control frame of {length} bytes, at most {FRAME_BYTES_MAX}", reason="corrupt")


class Reader:
    """The reader's end of a control connection, after the handshake."""

    def __init__(
        self, stream: tuple[asyncio.StreamReader, asyncio.StreamWriter], welcome: Welcome, fds: list[int]
    ) -> None:
        self._reader, self._writer = stream
        self.welcome = welcome
        self.fds = fds
        self._task: asyncio.Task[None] | None = None

    def listen(self, on_end: Callable[[TransferFailed], None], on_revoke: Callable[[], Awaitable[None]]) -> None:
        """Call back when the owner fences us, is gone or talks nonsense; `on_revoke` returns when no read is left."""
        self._task = asyncio.create_task(self._listen(on_end, on_revoke), name="transfer-control")

    async def _listen(self, on_end: Callable[[TransferFailed], None], on_revoke: Callable[[], Awaitable[None]]) -> None:
        name = self.welcome.identity.name
        try:
            while (frame := await read_frame(self._reader)) is not None:
                if not isinstance(frame, Revoke):
                    raise TransferFailed(f"{name} sent {type(frame).__name__}", reason="corrupt")
                on_end(TransferFailed(f"{name} has fenced this process", reason="fenced"))
                await on_revoke()
                self.send(Revoked())
        except TransferFailed as error:
            on_end(error)
        else:
            on_end(TransferFailed(f"{name} is gone: it closed the connection", reason="peer_gone"))

    def send(self, frame: Frame) -> None:
        """Small and rare, so it is not waited for."""
        if not self._writer.is_closing():
            self._writer.write(encode(frame))

    async def close(self) -> None:
        """Tells the owner that no read is under way and none will follow."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


async def dial(address: str, hello: Hello, deadline: Deadline) -> Reader:
    """Connect and shake hands. Raises HandshakeRefused, Overloaded, DeadlineExceeded or TransferFailed."""
    loop = asyncio.get_running_loop()
    future = loop.run_in_executor(None, _shake_hands, address, hello, deadline)
    try:
        sock, frame, fds = await asyncio.shield(future)
    except asyncio.CancelledError:
        future.add_done_callback(_drop)
        raise
    try:
        if isinstance(frame, Refused):
            raise _refusal(frame)
        if not isinstance(frame, Welcome) or frame.fds != len(fds):
            raise TransferFailed(
                f"{address} answered {type(frame).__name__} with {len(fds)} descriptors", reason="corrupt"
            )
        stream = await _streams(sock)
    except BaseException:
        _close(sock, fds)
        raise
    return Reader(stream, frame, fds)


async def _streams(sock: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    sock.setblocking(False)
    if sock.family == socket.AF_UNIX:
        return await asyncio.open_unix_connection(sock=sock)
    return await asyncio.open_connection(sock=sock)


def _drop(future: asyncio.Future[tuple[socket.socket, Frame, list[int]]]) -> None:
    if not future.cancelled() and future.exception() is None:
        sock, _, fds = future.result()
        _close(sock, fds)


def _close(sock: socket.socket, fds: list[int]) -> None:
    sock.close()
    for fd in fds:
        os.close(fd)


def _refusal(frame: Refused) -> TokenRelayError:
    return {Overloaded.code: Overloaded}.get(frame.code, HandshakeRefused)(frame.message)


def _shake_hands(address: str, hello: Hello, deadline: Deadline) -> tuple[socket.socket, Frame, list[int]]:
    """Blocking, in a thread: asyncio's streams do not take descriptors along."""
    family, target = parse_address(address)
    sock = socket.socket(family, socket.SOCK_STREAM)
    fds = array.array("i")
    try:
        _wait_at_most(sock, deadline)
        sock.connect(target)
        sock.sendall(encode(hello))
        header = _receive(sock, _LENGTH.size, fds, deadline)
        (length,) = _LENGTH.unpack(header)
        _check_length(length)
        return sock, decode(_receive(sock, length, fds, deadline)), fds.tolist()
    except TimeoutError:
        _close(sock, fds.tolist())
        raise DeadlineExceeded(f"{address} did not answer in time") from None
    except OSError as error:
        _close(sock, fds.tolist())
        raise TransferFailed(f"{address}: {error.strerror or error}", reason="peer_gone") from error
    except BaseException:
        _close(sock, fds.tolist())
        raise


def _wait_at_most(sock: socket.socket, deadline: Deadline) -> None:
    left_s = deadline.left_s()
    if left_s <= 0:
        raise TimeoutError
    sock.settimeout(None if left_s == float("inf") else left_s)


def _receive(sock: socket.socket, length: int, fds: array.array[int], deadline: Deadline) -> bytes:
    """Exactly `length` bytes; descriptors that come with them are added to `fds`."""
    received = bytearray()
    while len(received) < length:
        _wait_at_most(sock, deadline)
        space = socket.CMSG_SPACE(FDS_MAX * fds.itemsize)
        data, ancillary, flags, _ = sock.recvmsg(length - len(received), space, socket.MSG_CMSG_CLOEXEC)
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        if flags & socket.MSG_CTRUNC:
            raise TransferFailed(f"more than {FDS_MAX} descriptors came", reason="corrupt")
        if not data:
            raise TransferFailed("the connection was closed in the handshake", reason="peer_gone")
        received += data
    return bytes(received)


def parse_address(address: str) -> tuple[socket.AddressFamily, str | tuple[str, int]]:
    """`unix:/path` or `host:port`, IPv6 hosts in brackets. Raises HandshakeRefused."""
    if address.startswith("unix:"):
        return socket.AF_UNIX, address.removeprefix("unix:")
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdecimal() or int(port) > 65535:
        raise HandshakeRefused(f"the address {address!r} is neither unix:PATH nor HOST:PORT")
    bare = host.removeprefix("[").removesuffix("]")
    return (socket.AF_INET6 if ":" in bare else socket.AF_INET), (bare, int(port))

"""The owner's end of control connections: lets readers in, knows which are there, and cuts them off."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

from tokenrelay.base.deadlines import Deadline
from tokenrelay.base.errors import ConfigError, DeadlineExceeded, HandshakeRefused, TokenRelayError, TransferFailed
from tokenrelay.base.logging import get_logger
from tokenrelay.transfer.control import (
    VERSION,
    Active,
    Hello,
    Refused,
    Revoke,
    Revoked,
    Welcome,
    encode,
    parse_address,
    read_frame,
)
from tokenrelay.transfer.gate import OwnerGate
from tokenrelay.transfer.security import Security
from tokenrelay.transfer.transport import PEERS_MAX, Identity, Proof, Transport

log = get_logger("transfer")

HELLO_S = 5.0  # a connection that does not introduce itself is closed
LOOKS_S = 0.02  # between two looks at a gate while a fence waits
SO_PEERPIDFD = 77  # socket(7), since Linux 6.5; socket of Python 3.11 has no name for it


class Session:
    """One reader that was let in."""

    def __init__(self, hello: Hello, writer: asyncio.StreamWriter, gate: OwnerGate | None, pidfd: int | None) -> None:
        self.identity = hello.identity
        self.metadata = hello.metadata
        self.reading = False
        self._writer = writer
        self._gate = gate
        self._pidfd = pidfd
        self._acknowledged = False
        self._gone = False
        self._dead = False
        self._news = asyncio.Event()
        if pidfd is not None:
            asyncio.get_running_loop().add_reader(pidfd, self._died)

    def _died(self) -> None:
        assert self._pidfd is not None
        asyncio.get_running_loop().remove_reader(self._pidfd)
        self._dead = True
        self._news.set()

    def acknowledged(self) -> None:
        """It said that it stopped."""
        self._acknowledged = True
        self._news.set()

    def ended(self) -> None:
        """Its end of the connection is closed."""
        self._gone = True
        self._news.set()
        self._writer.close()
        if self._pidfd is not None:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None
        if self._gate is not None:
            self._gate.close()
            self._gate = None

    def _proof(self) -> Proof | None:
        if self._acknowledged:
            return Proof.ACKNOWLEDGED
        if self._dead:
            return Proof.DEAD
        if self._gone:
            return Proof.GONE
        return Proof.REVOKED if self._gate is not None and self._gate.held() else None

    async def fence(self, deadline: Deadline, kill: bool) -> Proof:
        """Ask it to stop, and find a proof. Raises DeadlineExceeded when there is none yet."""
        if self._gate is not None:
            self._gate.shut()
        if not self._writer.is_closing():
            self._writer.write(encode(Revoke()))
        if kill and self._pidfd is not None and self._proof() is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        while (proof := self._proof()) is None:
            if deadline.passed:
                raise DeadlineExceeded(
                    f"{self.identity.name} ({self.identity.incarnation}) neither lets go nor is it dead: "
                    "its blocks stay in quarantine"
                )
            self._news.clear()
            looks = LOOKS_S if self._gate is not None else deadline.left_s()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), min(looks, deadline.left_s()))
        return proof


class Owner:
    """Listens, and keeps a session per reader."""

    def __init__(
        self,
        transport: Transport,
        listen: str,
        welcome: Callable[[Hello], tuple[Welcome, list[int]]],
        *,
        gated: bool,
        security: Security | None = None,
        on_change: Callable[[], None] | None = None,
        on_end: Callable[[Session], None] | None = None,
    ) -> None:
        """`welcome` may raise an error of the tree to refuse. `gated`: only readers of this machine, with a gate."""
        self._transport = transport
        self._listen = listen
        self._welcome = welcome
        self._gated = gated
        self._security = security
        self._on_change = on_change or (lambda: None)
        self._on_end = on_end or (lambda _: None)
        self._server: asyncio.Server | None = None
        self._closing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.address = listen
        self.sessions: set[Session] = set()

    async def open(self) -> None:
        """Raises ConfigError that names the address."""
        try:
            family, target = parse_address(self._listen)
            if isinstance(target, str):
                self._server = await self._open_unix(Path(target))
            else:
                self._server = await asyncio.start_server(self._accepted, *target, family=family, backlog=PEERS_MAX)
                host, port = self._server.sockets[0].getsockname()[:2]
                self.address = f"[{host}]:{port}" if family is socket.AF_INET6 else f"{host}:{port}"
        except (OSError, HandshakeRefused) as error:
            raise ConfigError(f"cannot listen on {self._listen} for transfers: {error}") from error

    async def _open_unix(self, path: Path) -> asyncio.Server:
        _unlink(path)
        previous = os.umask(0o077)  # the socket is this user's alone
        try:
            return await asyncio.start_unix_server(self._accepted, path, backlog=PEERS_MAX)
        finally:
            os.umask(previous)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        kind, session = self._transport.kind, None
        try:
            session = await self._introduce(reader, writer)
            if session is not None:
                await self._serve(session, reader)
        except TransferFailed as error:
            self._transport.metrics.refused(kind, error.reason)
            log.warning("control connection closed", transport=kind, error=error.message)
        except ConnectionError:
            log.info("control connection broke", transport=kind)
        except asyncio.CancelledError:
            if not self._closing:  # asyncio.streams (3.11) reports a cancelled callback as a crash
                raise
        finally:
            if session is None:
                writer.close()
            else:
                await self._drop(session, reader)
            self._tasks.discard(task)

    async def _introduce(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Session | None:
        """The handshake; None when it was refused."""
        kind = self._transport.kind
        try:
            hello = await asyncio.wait_for(read_frame(reader), HELLO_S)
        except TimeoutError:
            raise TransferFailed("a connection did not introduce itself", reason="silent") from None
        if hello is None:
            return None
        if not isinstance(hello, Hello):
            raise TransferFailed(f"a {type(hello).__name__} before any Hello", reason="corrupt")
        gate: OwnerGate | None = None
        fds: list[int] = []
        pidfd = None
        try:
            self._check(hello)
            pidfd = _pidfd(writer)
            if self._gated and pidfd is None:
                raise HandshakeRefused("the peer's process is not visible here: shared memory needs one machine")
            welcome, fds = self._welcome(hello)
            if pidfd is not None:
                gate = OwnerGate()
                fds.append(gate.reader_fd())
            _send_with_fds(writer, encode(_with_fds(welcome, len(fds))), fds)
        except TokenRelayError as error:
            self._transport.metrics.refused(kind, error.code)
            writer.write(encode(Refused(error.code, error.message)))
            await writer.drain()
            if pidfd is not None:
                os.close(pidfd)
            return None
        finally:
            for fd in fds:
                os.close(fd)
        session = Session(hello, writer, gate, pidfd)
        self.sessions.add(session)
        return session

    def _check(self, hello: Hello) -> None:
        if self._security is not None:
            metadata = (("authorization", f"Bearer {hello.token}"),) if hello.token else ()
            if not self._security.allows(metadata):
                raise HandshakeRefused("the fleet's token is missing or wrong")
        if hello.version != VERSION or hello.kind != self._transport.kind:
            raise HandshakeRefused(
                f"transfer protocol: {self._transport.identity.name} has {self._transport.kind} {VERSION}, "
                f"{hello.identity.name} has {hello.kind} {hello.version}"
            )
        refusal = self._transport.refusal(hello.identity, hello.layout, len(self.sessions))
        if refusal is not None:
            raise refusal

    async def _serve(self, session: Session, reader: asyncio.StreamReader) -> None:
        while (frame := await read_frame(reader)) is not None:
            if isinstance(frame, Revoked):
                session.acknowledged()
            elif isinstance(frame, Active):
                session.reading = frame.reading
                self._on_change()
            else:
                raise TransferFailed(f"{session.identity.name} sent {type(frame).__name__}", reason="corrupt")

    async def _drop(self, session: Session, reader: asyncio.StreamReader) -> None:
        """It is over only when the peer's end is closed: a peer that talks nonsense may be reading still."""
        session.reading = False
        try:
            while not self._closing and not reader.at_eof() and await reader.read(4096):
                pass
        except (ConnectionError, asyncio.CancelledError):
            log.info("control connection broke", peer=session.identity.name)
        session.ended()
        self.sessions.discard(session)
        self._on_end(session)
        self._on_change()

    def peers(self) -> list[Identity]:
        """Readers that are there."""
        return [session.identity for session in self.sessions]

    async def cut_off(self, incarnation: str, deadline: Deadline, kill: bool) -> Proof:
        """Fence every session of that incarnation."""
        sessions = [session for session in self.sessions if session.identity.incarnation == incarnation]
        if not sessions:
            return Proof.ABSENT
        proofs = await asyncio.gather(*(session.fence(deadline, kill) for session in sessions))
        return proofs[0]

    async def close(self) -> None:
        """Stop listening and end every session, whether its reader lets go or not: this process ends."""
        self._closing = True
        if self._server is not None:
            self._server.close()
            _, target = parse_address(self._listen)
            if isinstance(target, str):
                _unlink(Path(target))
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks))


def _unlink(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()


def _with_fds(welcome: Welcome, count: int) -> Welcome:
    return Welcome(
        identity=welcome.identity,
        layout=welcome.layout,
        exported=welcome.exported,
        metadata=welcome.metadata,
        fds=count,
    )


def _send_with_fds(writer: asyncio.StreamWriter, frame: bytes, fds: list[int]) -> None:
    """The first frame of this end, so that the stream's own buffer is empty; the kernel takes what has room."""
    sent = 0
    if fds:
        found = writer.get_extra_info("socket")
        with socket.socket(fileno=os.dup(found.fileno())) as duplicate:
            sent = socket.send_fds(duplicate, [frame], fds)
    if sent < len(frame):
        writer.write(frame[sent:])


def _pidfd(writer: asyncio.StreamWriter) -> int | None:
    """Of the process at the other end, when it is one of this machine and this pid namespace."""
    found = writer.get_extra_info("socket")
    if found is None or found.family != socket.AF_UNIX:
        return None
    with socket.socket(fileno=os.dup(found.fileno())) as duplicate:
        try:
            return duplicate.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
        except OSError:
            pid = int.from_bytes(duplicate.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 4), "little")
            with contextlib.suppress(OSError):
                return os.pidfd_open(pid) if pid > 0 else None
    return None

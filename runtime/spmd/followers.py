"""A rank that follows, as its leader has it: a child of this process, or one that came from another host.

    child = Child(1, command)                                   # a process of this machine
    remotes = Rendezvous("10.0.0.1:29500", key).meet({2, 3}, welcome)

Both have a way for orders, one for answers, and an end that can be waited for.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from typing import Any, Protocol

from tokenrelay.base.errors import ConfigError, Unavailable
from tokenrelay.base.parent import announce

JOIN_MAX_S = 300.0  # ranks of other hosts are started by hand or by a launcher
HELLO_MAX_S = 5.0
HELLO_BYTES_MAX = 4096


class Follower(Protocol):
    """One rank beside the leader."""

    rank: int
    orders: int  # file to write frames to; does not block
    answers: int  # file to read answers from

    @property
    def pid(self) -> int | None:
        """Of its process, on this machine."""

    def wait(self) -> None:
        """Sleep until it has ended."""

    def stop(self) -> None:
        """No more orders: it ends by itself."""

    def kill(self) -> None:
        """It ends now; a rank of another host when it sees that nobody leads."""

    def reap(self, timeout_s: float) -> None:
        """After `stop`: leave nothing behind."""

    def ending(self) -> str:
        """How it ended, in words."""


class Child:
    """A process of this machine, which dies with this one."""

    def __init__(self, rank: int, command: Sequence[str]) -> None:
        self.rank = rank
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=announce())
        assert self._process.stdin is not None and self._process.stdout is not None
        self.orders, self.answers = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self.orders, False)

    @property
    def pid(self) -> int | None:
        """Of the process."""
        return self._process.pid

    def wait(self) -> None:
        """Sleep until it has ended."""
        self._process.wait()

    def stop(self) -> None:
        """Close its input."""
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()

    def kill(self) -> None:
        """SIGKILL."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def reap(self, timeout_s: float) -> None:
        """Wait, then kill."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def ending(self) -> str:
        """Its signal or exit code."""
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return "it closed its pipe"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


class Remote:
    """A rank that came through the rendezvous."""

    def __init__(self, rank: int, connection: socket.socket, address: str) -> None:
        self.rank = rank
        self._connection = connection
        self._address = address
        connection.setblocking(False)
        self.orders = self.answers = connection.fileno()

    @property
    def pid(self) -> int | None:
        """Nobody here knows."""
        return None

    def wait(self) -> None:
        """Sleep until its end of the connection is closed."""
        poll = select.poll()
        poll.register(self.answers, select.POLLRDHUP)
        poll.poll()

    def stop(self) -> None:
        """Close our end."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def kill(self) -> None:
        """Close our end: it ends between two steps, or when a collective fails because its peers are gone."""
        self.stop()

    def reap(self, timeout_s: float) -> None:
        """Free the connection."""
        self._connection.close()

    def ending(self) -> str:
        """What can be said from here."""
        return f"its connection from {self._address} ended"


class Rendezvous:
    """Where ranks of other hosts come to: each connects, names its rank and the key, and is told where to go on.

    Who comes when all are here is answered too, by a thread, until `close`: nobody is left to guess.
    """

    def __init__(self, address: str, key: str) -> None:
        """Listens at once. Raises ConfigError for what is no address of this host."""
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            raise ConfigError(f"worker.rendezvous is {address!r}, expected host:port of this host")
        self.host, self._key = host, key
        try:
            self._listener = socket.create_server((host, int(port)))
        except OSError as error:
            raise ConfigError(f"worker.rendezvous: cannot listen on {address}: {error.strerror}") from error
        self.port: int = self._listener.getsockname()[1]
        self._answering: threading.Thread | None = None

    def meet(self, ranks: set[int], welcome: dict[str, Any], timeout_s: float = JOIN_MAX_S) -> list[Follower]:
        """All of `ranks`, in order. Raises Unavailable that names those that did not come in time."""
        end, came = time.monotonic() + timeout_s, dict[int, Follower]()
        while missing := sorted(ranks - came.keys()):
            self._listener.settimeout(max(0.01, end - time.monotonic()))
            try:
                connection, (host, *_) = self._listener.accept()
            except TimeoutError:
                self.close()
                for follower in came.values():
                    follower.kill()
                names = ", ".join(map(str, missing))
                raise Unavailable(f"ranks {names} did not come to {self.host}:{self.port}") from None
            rank = self._rank_of(connection, ranks)
            if rank is None:
                continue
            if rank not in missing:
                _turn_away(connection, f"rank {rank} is here already", later=True)
                continue
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            _say(connection, welcome)
            came[rank] = Remote(rank, connection, str(host))
        self._listener.settimeout(None)
        self._answering = threading.Thread(target=self._answer, args=(ranks,), name="rendezvous", daemon=True)
        self._answering.start()
        return [came[rank] for rank in sorted(came)]

    def close(self) -> None:
        """Nobody is answered any more; idempotent."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread: closing alone would not
        self._listener.close()
        if self._answering is not None:
            self._answering.join(HELLO_MAX_S + 1)

    def _answer(self, ranks: set[int]) -> None:
        """All ranks are here. One that comes again was started anew: its leader will be too, so it waits."""
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # closed
            if (rank := self._rank_of(connection, ranks)) is not None:
                _turn_away(connection, f"rank {rank} is here already", later=True)

    def _rank_of(self, connection: socket.socket, ranks: set[int]) -> int | None:
        """The rank that came, if it has the key and is one of `ranks`; others are told and gone."""
        hello = _hello(connection)
        rank, key = hello.get("rank"), str(hello.get("key", ""))
        known = hmac.compare_digest(key.encode(), self._key.encode())
        if known and isinstance(rank, int) and rank in ranks:
            return rank
        _turn_away(connection, f"rank {rank} is not awaited here, or its key is another one")
        return None


def _turn_away(connection: socket.socket, reason: str, *, later: bool = False) -> None:
    """`later`: it may try again."""
    _say(connection, {"error": reason, "later": later})
    connection.close()


def _hello(connection: socket.socket) -> dict[str, Any]:
    """The first line of whoever connected; empty for anything that is none."""
    connection.settimeout(HELLO_MAX_S)
    line = b""
    try:
        while not line.endswith(b"\n") and len(line) < HELLO_BYTES_MAX and (part := connection.recv(1024)):
            line += part
        hello = json.loads(line)
    except (OSError, ValueError):
        return {}
    return hello if isinstance(hello, dict) else {}


def _say(connection: socket.socket, words: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps(words).encode() + b"\n")

"""One life of a child process: spawned so that it dies with us, watched without polling, its start-up followed.

child = ChildProcess.spawn(ChildSpec("worker", [...]), environment)
facts = await child.wait_ready(on_progress, stall_s=300)   # ChildFailed says why not, in one sentence
code = await child.exited
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenrelay.base.errors import TokenRelayError
from tokenrelay.base.parent import announce
from tokenrelay.base.status import LINE_BYTES_MAX, parse_status

STATUS_FD = "{status_fd}"  # in a ChildSpec's argv: replaced by the number of the descriptor to report on

Progress = Callable[[str, int, int], None]  # what, done, total


class ChildFailed(TokenRelayError):
    """A child process did not start, or died."""

    code = "child_failed"


@dataclass(frozen=True)
class ChildSpec:
    """How to start a child: its name, its command (see STATUS_FD), a stale socket to unlink before each start, and
    descriptors that it inherits. `light`: it does no tensor work. `overlaps`: its next life may begin before the last
    one has ended."""

    name: str
    argv: Sequence[str]
    socket: str | None = None
    pass_fds: tuple[int, ...] = ()
    light: bool = False
    overlaps: bool = False


class ChildProcess:
    """A running child. Everything but `spawn` belongs to the event loop it was spawned on."""

    def __init__(self, name: str, popen: subprocess.Popen[bytes], status_fd: int) -> None:
        self.name = name
        self.pid = popen.pid
        loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[int] = loop.create_future()  # the exit code; -N for signal N
        self._popen = popen
        self._status_fd = status_fd
        threading.Thread(target=self._watch, args=(loop,), name=f"watch-{name}", daemon=True).start()

    @classmethod
    def spawn(cls, spec: ChildSpec, environment: Mapping[str, str]) -> ChildProcess:
        """Start it in a session of its own, so that a terminal's Ctrl-C reaches us alone. Raises ChildFailed."""
        if spec.socket is not None:
            Path(spec.socket).unlink(missing_ok=True)
        reading, writing = os.pipe()
        try:
            popen = subprocess.Popen(
                [argument.replace(STATUS_FD, str(writing)) for argument in spec.argv],
                env=announce(environment),
                stdin=subprocess.DEVNULL,
                stdout=2,  # a library that prints must not mix with what our stdout is for
                pass_fds=(writing, *spec.pass_fds),
                start_new_session=True,
            )
        except OSError as error:
            os.close(reading)
            raise ChildFailed(f"cannot start the {spec.name} ({spec.argv[0]}): {error.strerror}") from error
        finally:
            os.close(writing)
        return cls(spec.name, popen, reading)

    async def wait_ready(self, on_progress: Progress, *, stall_s: float) -> dict[str, Any]:
        """Follow its status lines until `ready`; returns that line's facts.

        Raises ChildFailed when it reports a failure, ends, or says nothing for `stall_s` seconds.
        """
        reader = asyncio.StreamReader(limit=LINE_BYTES_MAX)
        loop = asyncio.get_running_loop()
        pipe = os.fdopen(self._take_status_fd(), "rb", buffering=0)
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
        try:
            while True:
                fields = await self._next_status(reader, stall_s)
                if fields["event"] == "ready":
                    return {key: value for key, value in fields.items() if key != "event"}
                if fields["event"] == "failed":
                    raise ChildFailed(str(fields.get("message", f"the {self.name} failed without a reason")))
                if fields["event"] == "progress":
                    on_progress(str(fields["what"]), int(fields["done"]), int(fields["total"]))
        finally:
            transport.close()

    def signal(self, number: int) -> None:
        """Send a signal; nothing happens when it is gone already."""
        if not self.exited.done():
            self._popen.send_signal(number)

    async def kill(self) -> None:
        """Stop it without asking, and wait until it is gone."""
        self.signal(signal.SIGKILL)
        await asyncio.shield(self.exited)
        if self._status_fd >= 0:
            os.close(self._take_status_fd())

    async def _next_status(self, reader: asyncio.StreamReader, stall_s: float) -> dict[str, Any]:
        """The next well-formed status line; ChildFailed at the end of them."""
        while True:
            line = await self._read_line(reader, stall_s)
            if not line:
                raise ChildFailed(await self._epitaph())
            fields = parse_status(line)
            if fields is not None:
                return fields

    async def _read_line(self, reader: asyncio.StreamReader, stall_s: float) -> bytes:
        """One line, b"" at the end. A child whose own children keep the pipe open must not hide its death."""
        reading = asyncio.ensure_future(reader.readline())
        either: set[asyncio.Future[Any]] = {reading, self.exited}
        try:
            await asyncio.wait(either, timeout=stall_s, return_when=asyncio.FIRST_COMPLETED)
            if self.exited.done() and not reading.done():  # what it wrote last may still be in the pipe
                await asyncio.wait({reading}, timeout=1.0)
            if reading.done():
                return reading.result()
            if self.exited.done():
                return b""
            raise ChildFailed(f"the {self.name} said nothing for {stall_s:.0f} s while it started")
        except ValueError:  # longer than a status line may be
            return b"\n"
        finally:
            reading.cancel()

    async def _epitaph(self) -> str:
        """Why it ended before it was ready, as far as its exit code tells."""
        done, _ = await asyncio.wait({self.exited}, timeout=5.0)
        if not done:
            return f"the {self.name} stopped reporting before it was ready"
        return f"the {self.name} {describe_exit(self.exited.result())} before it was ready"

    def _take_status_fd(self) -> int:
        fd, self._status_fd = self._status_fd, -1
        assert fd >= 0, "wait_ready is for once"
        return fd

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        code = self._popen.wait()
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(self.exited.set_result, code)


def describe_exit(code: int) -> str:
    """An exit code in words: `ended with exit code 3`, `was killed by SIGKILL`."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = " (out of memory?)" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"

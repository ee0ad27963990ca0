"""A server of one's own as a child process: for `tokenrelay chat`, benchmarks and tests.

    with OwnServer(["--dtype", "float32"]) as server:      # ChildFailed says in one sentence why it did not start
        ApiClient(server.url).models()

It runs `tokenrelay serve` on a free port, and ends it at the end: first by draining, then at once.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import IO, Any

from tokenrelay.base.parent import announce
from tokenrelay.base.status import parse_status
from tokenrelay.cli.process import ChildFailed, describe_exit

START_S = 600.0  # a start may go without news for so long
DRAIN_S = 30.0


class OwnServer:
    """`tokenrelay serve ARGUMENTS --port 0` (or another command) for the time of a `with` block."""

    def __init__(
        self,
        arguments: Sequence[str] = (),
        *,
        command: str = "serve",
        on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
        stderr: IO[Any] | int | None = None,
        quiet: bool = False,
    ) -> None:
        """`stderr`: where the logs go, by default to ours. `quiet`: no start-up display even on a terminal."""
        self._command = command
        self._arguments = [str(argument) for argument in arguments]
        self._on_progress = on_progress
        self._stderr = stderr
        self._quiet = quiet
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""
        self.facts: dict[str, Any] = {}  # the worker's, and `worker_pid`, `router_pid`

    def __enter__(self) -> OwnServer:
        reading, writing = os.pipe()
        command = [sys.executable, "-Pm", "tokenrelay.cli.main", self._command, *self._arguments]
        if "--port" not in self._arguments:
            command += ["--port", "0"]
        if self._quiet:
            command += ["--quiet"]
        try:
            self._process = subprocess.Popen(
                [*command, "--status-fd", str(writing)],
                stdin=subprocess.DEVNULL,
                stdout=2 if self._stderr is None else self._stderr,
                stderr=self._stderr,
                pass_fds=(writing,),
                start_new_session=True,
                env=announce(),
            )
        finally:
            os.close(writing)
        try:
            with os.fdopen(reading, "rb", buffering=0) as pipe:
                self._wait_ready(pipe)
        except BaseException:
            self._process.kill()  # its children die with it
            self._process.wait()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The supervisor's process."""
        assert self._process is not None, "use it as a context manager"
        return self._process

    def stop(self) -> int:
        """Drain, then stop at once, then kill; returns the exit code."""
        for number, wait_s in ((signal.SIGTERM, DRAIN_S), (signal.SIGTERM, 10.0)):
            if self.process.poll() is not None:
                break
            self.process.send_signal(number)
            try:
                return self.process.wait(wait_s)
            except subprocess.TimeoutExpired:
                continue
        self.process.kill()
        return self.process.wait()

    def _wait_ready(self, pipe: IO[bytes]) -> None:
        for line in _lines(pipe):
            fields = parse_status(line)
            if fields is None:
                continue
            if fields["event"] == "progress":
                self._on_progress(fields["what"], int(fields["done"]), int(fields["total"]))
            elif fields["event"] == "failed":
                raise ChildFailed(str(fields["message"]))
            elif fields["event"] == "ready":
                self.facts = fields
                self.url = str(fields["url"])
                return
        code = self.process.wait(10)
        raise ChildFailed(f"the server {describe_exit(code)} before it was ready")


def _lines(pipe: IO[bytes]) -> Iterator[bytes]:
    """Lines as they come; ends at the end of the pipe. Raises ChildFailed after START_S without any."""
    buffer = b""
    deadline_s = time.monotonic() + START_S
    while True:
        ready, _, _ = select.select([pipe], [], [], max(0.0, deadline_s - time.monotonic()))
        if not ready:
            raise ChildFailed(f"the server said nothing for {START_S:.0f} s while it started")
        read = pipe.read(65536)
        if not read:
            return
        deadline_s = time.monotonic() + START_S
        *lines, buffer = (buffer + read).split(b"\n")
        yield from lines

"""A command on a pseudo-terminal: type keys, wait for text.

terminal = Terminal([sys.executable, "-m", "tokenrelay.cli.main", "chat"])
terminal.until("› "); terminal.type("hi\\r"); terminal.until("hello"); terminal.type("\\x04")
assert terminal.end() == 0
"""

from __future__ import annotations

import codecs
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Sequence

# It takes its stdin as the terminal that sends it signals, and hears Ctrl-C even where its starter does not.
_BEGIN = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""
_STYLE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A process and our end of its terminal; it is killed when this object goes unused (`close`)."""

    def __init__(self, command: Sequence[str], *, columns: int = 100) -> None:
        self._fd, its = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns), "LINES": "40"}
        try:  # not pty.fork: what runs gRPC's threads may not run Python in a forked child
            self._process = subprocess.Popen(
                [sys.executable, "-ISc", _BEGIN, *command],
                stdin=its,
                stdout=its,
                stderr=its,
                env=environment,
                start_new_session=True,
            )
        finally:
            os.close(its)
        self.pid = self._process.pid
        self.seen = ""
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def type(self, text: str) -> None:
        """Send keys."""
        os.write(self._fd, text.encode())

    def until(self, pattern: str, within_s: float = 60.0, *, plain: bool = False) -> str:
        """Wait for `pattern` in what comes from now on; the text up to its end. `plain`: without styles."""
        deadline_s = time.monotonic() + within_s
        while (match := re.search(pattern, self.seen, re.DOTALL)) is None:
            left_s = deadline_s - time.monotonic()
            ready = select.select([self._fd], [], [], max(0, left_s))[0]
            assert ready, f"no {pattern!r} in {self.seen!r}"
            try:
                text = self._decode(os.read(self._fd, 65536))
            except OSError as error:
                raise AssertionError(f"ended without {pattern!r}: {self.seen!r}") from error
            self.seen = _STYLE.sub("", self.seen + text) if plain else self.seen + text
        text, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return text

    def end(self, within_s: float = 60.0) -> int:
        """Read to the end; the exit code."""
        while select.select([self._fd], [], [], within_s)[0]:
            try:
                if not os.read(self._fd, 65536):
                    break
            except OSError:
                break
        os.close(self._fd)
        return self._process.wait()

    def close(self) -> None:
        """Kill it if it still runs."""
        self._process.kill()
        self._process.wait()

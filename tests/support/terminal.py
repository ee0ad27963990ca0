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
import signal
import time
from collections.abc import Sequence

_STYLE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A process and our end of its terminal; it is killed when this object goes unused (`close`)."""

    def __init__(self, command: Sequence[str], *, columns: int = 100) -> None:
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.environ.update(TERM="xterm", COLUMNS=str(columns), LINES="40")
            os.execv(command[0], list(command))
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
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.pid = 0
        return code

    def close(self) -> None:
        """Kill it if it still runs."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

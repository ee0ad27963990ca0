"""A kvstore as a process of its own: to be killed and paused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any


class KvProcess:
    """`python -m tokenrelay.services.kvstore`, ready when made."""

    def __init__(self, folder: Path, name: str, **fields: Any) -> None:
        self.address = f"unix:{folder}/{name}.sock"
        flags = {"address": self.address, "admin_port": 0, "log_style": "json", "answer_s": 0.2, **fields}
        read_fd, write_fd = os.pipe()
        command = [sys.executable, "-m", "tokenrelay.services.kvstore", "--status-fd", str(write_fd)]
        for flag, value in flags.items():
            text = ",".join(value) if isinstance(value, tuple) else str(value)
            command += [f"--{flag.replace('_', '-')}", text]
        self.log = folder / f"{name}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, pass_fds=(write_fd,), stdout=log, stderr=log, start_new_session=True
            )
        os.close(write_fd)
        with os.fdopen(read_fd, "rb") as status:
            line = status.readline()
        assert line, self.log.read_text()
        self.ready = json.loads(line)
        assert self.ready["event"] == "ready", self.ready

    def signal(self, number: signal.Signals) -> None:
        """Send it."""
        os.kill(self.process.pid, number)

    def wait(self, timeout_s: float = 10) -> int:
        """Its exit code."""
        return self.process.wait(timeout_s)

    def close(self) -> None:
        """Whatever state it is in."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

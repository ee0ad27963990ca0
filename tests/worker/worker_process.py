"""A real worker process on a tiny random model, and what a test submits to it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from tokenrelay.proto import worker_pb2
from tokenrelay.services.chassis.client import WorkerClient
from tokenrelay.services.chassis.wire import pack


class WorkerProcess:
    """`python -m tokenrelay.cli.worker`, its status lines, its socket."""

    def __init__(self, *flags: str, model: Path) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="tr-")  # short: a socket's path has at most 107 bytes
        self.socket = f"{self._folder.name}/w.sock"
        read_fd, write_fd = os.pipe()
        command = [sys.executable, "-Pm", "tokenrelay.cli.worker", "--model", str(model), "--socket", self.socket]
        command += [
            "--status-fd",
            str(write_fd),
            "--dtype",
            "float32",
            "--threads",
            "1",
            "--block-tokens",
            "16",
            *flags,
        ]
        self.log = Path(self._folder.name) / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, pass_fds=(write_fd,), stderr=log, start_new_session=True)
        os.close(write_fd)
        self.status: list[dict[str, Any]] = []
        self._settled = threading.Event()
        threading.Thread(target=self._read, args=(read_fd,), daemon=True).start()

    def _read(self, fd: int) -> None:
        with os.fdopen(fd, "rb") as lines:
            for line in lines:
                self.status.append(json.loads(line))
                if self.status[-1]["event"] in ("ready", "failed"):
                    self._settled.set()
        self._settled.set()

    def wait_settled(self) -> dict[str, Any]:
        """Its `ready` or `failed`."""
        assert self._settled.wait(120), "neither ready nor failed"
        assert self.status, self.log.read_text()
        return self.status[-1]

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        return self.process.wait(30)

    def socket_is_gone(self) -> bool:
        return not Path(self.socket).exists()

    def close(self) -> None:
        self.process.kill()
        self.process.wait(30)
        self._folder.cleanup()


class Stream:
    """One submitted sequence."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.outputs: list[worker_pb2.SequenceOutput] = []
        self.terminals: list[worker_pb2.SequenceOutput] = []
        self.changed = asyncio.Event()

    def __call__(self, output: worker_pb2.SequenceOutput) -> None:
        assert not self.terminals, "an output after the terminal one"
        self.outputs.append(output)
        ids = output.token_ids
        self.token_ids += [int.from_bytes(ids[i : i + 4], "little") for i in range(0, len(ids), 4)]
        if output.finish:
            self.terminals.append(output)
        self.changed.set()

    async def until(self, condition: Any) -> None:
        while not condition():
            self.changed.clear()
            await asyncio.wait_for(self.changed.wait(), 60)

    async def ended(self) -> worker_pb2.SequenceOutput:
        await self.until(lambda: self.terminals)
        return self.terminals[0]


def submit_message(prompt: list[int], tokens_max: int = 16, **fields: Any) -> worker_pb2.Submit:
    sampling = fields.pop("sampling", None) or worker_pb2.Sampling(ignore_eos=True)
    return worker_pb2.Submit(
        token_ids=pack(prompt), output_start=len(prompt), tokens_max=tokens_max, sampling=sampling, **fields
    )


async def connect(worker: WorkerProcess) -> WorkerClient:
    client = WorkerClient(f"unix:{worker.socket}")
    await client.start()
    await client.wait_ready(30)
    return client

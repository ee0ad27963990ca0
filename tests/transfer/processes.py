"""Starts peer.py and talks to it."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any


class PeerError(Exception):
    """What the other process answered instead of a result."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


class PeerProcess:
    """Another process with a pool and a transport."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._numbers = 0
        self._reader: asyncio.Task[None] | None = None

    @staticmethod
    async def start(**given: Any) -> PeerProcess:
        """Runs when this returns."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(Path(__file__).parent / "peer.py"),
            json.dumps(given),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=1 << 24,
        )
        peer = PeerProcess(process)
        assert process.stdout is not None
        ready = await asyncio.wait_for(process.stdout.readline(), 30)
        assert json.loads(ready)["ready"]
        peer._reader = asyncio.create_task(peer._read())
        return peer

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            answer = json.loads(line)
            self._answers.pop(answer["number"]).set_result(answer)
        for future in self._answers.values():
            future.set_exception(PeerError("dead", "the process ended"))
        self._answers.clear()

    def ask(self, do: str, **arguments: Any) -> asyncio.Future[Any]:
        """Send a command; its result when awaited."""
        self._numbers += 1
        future = self._answers[self._numbers] = asyncio.get_running_loop().create_future()
        assert self._process.stdin is not None
        line = json.dumps({"number": self._numbers, "do": do, **arguments}) + "\n"
        self._process.stdin.write(line.encode())
        return asyncio.ensure_future(self._result(future))

    async def _result(self, future: asyncio.Future[dict[str, Any]]) -> Any:
        answer = await asyncio.wait_for(future, 60)
        if "error" in answer:
            raise PeerError(answer["error"], answer["message"])
        return answer["result"]

    async def endpoint(self) -> bytes:
        """Of its transport."""
        return bytes.fromhex((await self.ask("endpoint"))["endpoint"])

    async def incarnation(self) -> str:
        """Its life."""
        return str((await self.ask("endpoint"))["incarnation"])

    def signal(self, number: signal.Signals) -> None:
        """Kill, pause or continue it."""
        self._process.send_signal(number)

    async def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    async def stop(self) -> None:
        """Let it close its transport; kill what does not end."""
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGCONT)
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                await asyncio.wait_for(self._process.wait(), 10)
            except TimeoutError:
                await self.kill()
                raise
        if self._reader is not None:
            await self._reader

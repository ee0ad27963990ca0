"""A router that tests send anything to."""

from __future__ import annotations

import asyncio
from pathlib import Path

from mock_worker import MockWorker
from router_stack import until

from tokenrelay.services.router.config import RouterConfig
from tokenrelay.services.router.service import RouterService


class Fuzzed:
    """A stack on a loop of its own, which hypothesis' synchronous examples share."""

    def __init__(self, folder: Path, sockets: Path) -> None:
        self.loop = asyncio.new_event_loop()
        self.worker = MockWorker(f"unix:{sockets}/w", folder)
        self.loop.run_until_complete(self._start())

    async def _start(self) -> None:
        await self.worker.start()
        text = 'Hi <think>x</think> <tool_call>{"name": "x", "arguments": {"a": 👋}}</tool_call> the end'
        self.worker.say(text, per_step=3)
        self.service = RouterService(RouterConfig(port=0, worker=(self.worker.address,), body_bytes_max=1 << 16))
        self.port = await self.service.start()
        await until(lambda: bool(self.service.pool.usable))

    async def _exchange(self, head: bytes, body: bytes) -> tuple[int, bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(head + f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        reply = await reader.read()
        writer.close()
        return int(reply.split(b" ", 2)[1]), reply.partition(b"\r\n\r\n")[2]

    def send(self, path: str, body: bytes) -> tuple[int, bytes]:
        """(status, body); a reply must come within seconds, and nothing may be left at the worker."""
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\n".encode()
        status, reply = self.loop.run_until_complete(asyncio.wait_for(self._exchange(head, body), 10))
        self.loop.run_until_complete(
            until(lambda: self.worker.running == 0 and not self.service.state.metrics.requests_open)
        )
        return status, reply

    def close(self) -> None:
        self.loop.run_until_complete(self.service.stop())
        self.loop.run_until_complete(self.worker.stop())
        self.loop.close()

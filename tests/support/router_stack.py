"""A router under test: what a test talks to. The fixtures are in tests/router/conftest.py."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
from mock_worker import MockWorker

from tokenrelay.services.router.service import RouterService


@dataclass
class Stack:
    """What a test talks to."""

    worker: MockWorker
    service: RouterService
    url: str
    http: aiohttp.ClientSession

    async def post(self, path: str, body: Any) -> tuple[int, Any]:
        """(status, JSON) of one request."""
        async with self.http.post(self.url + path, json=body) as response:
            return response.status, await response.json()

    async def chat(self, content: str = "Hi", **body: Any) -> Any:
        """A chat that is expected to succeed."""
        body = {"messages": [{"role": "user", "content": content}], **body}
        status, reply = await self.post("/v1/chat/completions", body)
        assert status == 200, reply
        return reply

    async def stream(self, path: str, body: Any) -> list[Any]:
        """The events of one streamed request."""
        async with self.http.post(self.url + path, json={**body, "stream": True}) as response:
            return await read_stream(response)

    async def chat_stream(self, content: str = "Hi", **body: Any) -> list[Any]:
        """The events of a streamed chat."""
        return await self.stream("/v1/chat/completions", {"messages": [{"role": "user", "content": content}], **body})

    async def connect(self, body: Any, version: str = "1.1") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A chat request on a connection of its own."""
        reader, writer = await asyncio.open_connection("127.0.0.1", int(self.url.rsplit(":", 1)[1]))
        data = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/{version}\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        return reader, writer

    async def idle(self) -> None:
        """Until the worker runs nothing."""
        await until(lambda: self.worker.running == 0)


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Wait for a condition, with a bound."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - conditions of other objects have no event
            await asyncio.sleep(0.005)


StartStack = Callable[..., Awaitable[Stack]]


async def read_stream(response: aiohttp.ClientResponse) -> list[Any]:
    """The events of an SSE reply: parsed JSON, and "[DONE]"."""
    assert response.content_type == "text/event-stream", await response.text()
    events: list[Any] = []
    for block in (await response.read()).decode().split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        assert all(line.startswith("data: ") for line in lines), block
        events += [line if line == "[DONE]" else json.loads(line) for line in (line[6:] for line in lines)]
    return events

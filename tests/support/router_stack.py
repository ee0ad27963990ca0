"""A router under test: what a test talks to. The fixtures are in tests/router/conftest.py."""

from __future__ import annotations

import asyncio
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

    async def idle(self) -> None:
        """Until the worker runs nothing."""
        await until(lambda: self.worker.running == 0)


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Wait for a condition, with a bound."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - conditions of other objects have no event
            await asyncio.sleep(0.005)


StartStack = Callable[..., Awaitable[Stack]]

"""What tests of several workers ask: streams that all run at once, and the router's pages."""

from __future__ import annotations

import asyncio
import json
import re
import urllib.request
from typing import Any

import aiohttp
from serving import Server

PATH = "/v1/chat/completions"


def body(server: Server, number: int, **parameters: Any) -> dict[str, Any]:
    """Request `number`: greedy where it is even, sampled with a seed where it is odd."""
    sampling = {"temperature": 0} if number % 2 == 0 else {"temperature": 1.0, "seed": number}
    message = {"role": "user", "content": f"number {number} " * (1 + number % 5)}
    return {"model": server.model, "messages": [message], "ignore_eos": True, **sampling, **parameters}


async def run(
    server: Server, numbers: range, tokens: int, begun: asyncio.Event | None = None, **parameters: Any
) -> list[str]:
    """All at once, streamed: their texts. `begun` is set when each has a token."""
    waiting = set(numbers)

    async def one(http: aiohttp.ClientSession, number: int) -> str:
        text, ends = "", 0
        usage = {"include_usage": True}
        wanted = body(server, number, max_tokens=tokens, stream=True, stream_options=usage, **parameters)
        async with http.post(server.url + PATH, json=wanted) as response:
            assert response.status == 200, await response.text()
            async for line in response.content:
                if not line.startswith(b"data: ") or line == b"data: [DONE]\n":
                    ends += line == b"data: [DONE]\n"
                    continue
                event = json.loads(line[6:])
                assert "error" not in event, event
                if event.get("usage"):
                    assert event["usage"]["completion_tokens"] == tokens
                for choice in event["choices"]:
                    text += choice["delta"].get("content") or ""
                waiting.discard(number)
                if begun is not None and not waiting:
                    begun.set()
        assert ends == 1
        return text

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        return await asyncio.gather(*(one(http, number) for number in numbers))


def workers(server: Server) -> list[dict[str, Any]]:
    with urllib.request.urlopen(f"{server.url}/workers", timeout=10) as response:
        found: list[dict[str, Any]] = json.load(response)["workers"]
        return found


def page(server: Server) -> str:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as response:
        return str(response.read(), "utf-8")


def counted(server: Server, name: str) -> dict[str, int]:
    """A counter's samples by their labels."""
    found = re.findall(rf"^tokenrelay_{name}\{{(.*)\}} (\d+)", page(server), re.MULTILINE)
    return {labels: int(count) for labels, count in found}

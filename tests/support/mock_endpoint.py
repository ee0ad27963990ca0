"""An OpenAI endpoint without a model, in a thread: counts four characters as a token, caches every prefix, and paces.

    with MockEndpoint(tps=400, first_s=0.01) as endpoint:
        endpoint.url, endpoint.bodies

`together`: so many answers at once share the speed; beyond it each is slower by that much.
"""

from __future__ import annotations

import asyncio
import json
import threading
from types import TracebackType
from typing import Any

from aiohttp import web

CHARS_A_TOKEN = 4
OVERHEAD_TOKENS = 7
CACHE_CHARS = 16


class MockEndpoint:
    """`takes_ignore_eos`: else a 400 that names it.

    From its `troubles_from`-th chat on it refuses with `refuse`, a (status, message), or cuts streams after `cut_after`
    tokens, where these are set.
    """

    def __init__(
        self, *, tps: float = 2000.0, first_s: float = 0.002, together: int = 1000, takes_ignore_eos: bool = True
    ) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.refuse: tuple[int, str] | None = None
        self.says_cached = True
        self.streams_usage = True
        self.cut_after: int | None = None
        self.troubles_from = 0
        self._tps, self._first_s, self._together = tps, first_s, together
        self._takes_ignore_eos = takes_ignore_eos
        self._prefixes: set[int] = set()
        self._running = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.url = ""

    def __enter__(self) -> MockEndpoint:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _start(self) -> None:
        app = web.Application(client_max_size=64 << 20)
        app.add_routes([web.get("/v1/models", self._models), web.post("/v1/chat/completions", self._chat)])
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "mock-model"}]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.keys.add(request.headers.get("Authorization"))
        troubled = len(self.bodies) > self.troubles_from
        refuse = self.refuse if troubled else None
        if refuse is None and "ignore_eos" in body and not self._takes_ignore_eos:
            refuse = 400, "unknown parameter: ignore_eos"
        if refuse is not None:
            return web.json_response({"error": {"message": refuse[1]}}, status=refuse[0])
        text = "".join(message["content"] for message in body["messages"])
        self._running += 1
        if not body.get("stream"):
            count = len(text) // CHARS_A_TOKEN + OVERHEAD_TOKENS
            self._running -= 1
            return web.json_response({"choices": [], "usage": {"prompt_tokens": count, "completion_tokens": 1}})
        try:
            return await self._stream(request, body, text, self.cut_after if troubled else None)
        except ConnectionError:  # the client left
            raise asyncio.CancelledError from None
        finally:
            self._running -= 1

    async def _stream(
        self, request: web.Request, body: dict[str, Any], text: str, cut_after: int | None
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        cached = self._cached(text)
        await asyncio.sleep(self._first_s)
        tokens = body["max_tokens"]
        answer = ""
        for number in range(tokens):
            if cut_after is not None and number >= cut_after:
                return response
            word = "tok "
            answer += word
            await response.write(_event({"choices": [{"index": 0, "delta": {"content": word}}]}))
            await asyncio.sleep(max(1.0, self._running / self._together) / self._tps)
        self._remember(text + answer)
        usage: dict[str, Any] = {
            "prompt_tokens": len(text) // CHARS_A_TOKEN + OVERHEAD_TOKENS,
            "completion_tokens": tokens,
        }
        if self.says_cached:
            usage["prompt_tokens_details"] = {"cached_tokens": cached // CHARS_A_TOKEN}
        await response.write(_event({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}))
        if self.streams_usage:
            await response.write(_event({"choices": [], "usage": usage}))
        await response.write(b"data: [DONE]\n\n")
        return response

    def _cached(self, text: str) -> int:
        """Characters of it that were there before."""
        for end in range(len(text) - len(text) % CACHE_CHARS, 0, -CACHE_CHARS):
            if hash(text[:end]) in self._prefixes:
                self._remember(text)
                return end
        self._remember(text)
        return 0

    def _remember(self, text: str) -> None:
        self._prefixes.update(hash(text[:end]) for end in range(CACHE_CHARS, len(text) + 1, CACHE_CHARS))


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"

"""Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html) written from callbacks.

    stream = EventStream(request, headers, send_buffer_bytes=…)
    await stream.open(first)          # status, headers and the first event, in one segment
    stream.send(event)                # from a callback; no task is woken
    await stream.close(last, timeout_s=30)

`send` writes to the transport itself: one call per step and sequence instead of a task switch and aiohttp's
coroutine. Who calls asks `writable` first: while a slow reader's buffer is above the bound it keeps the deltas,
merged, for a later event.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from aiohttp import HttpVersion11, web

DONE = b"data: [DONE]\n\n"
PING = b": waiting\n\n"
_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def event(data: bytes) -> bytes:
    """One event. JSON has no raw line breaks, so one data line is enough."""
    return b"data: %b\n\n" % data


def named_event(name: str, data: bytes) -> bytes:
    """One event with a type, as Anthropic's API and OpenAI's Responses have them."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), data)


class EventStream:
    """One SSE reply."""

    __slots__ = ("_chunked", "_request", "_send_buffer_bytes", "_transport", "opened", "response")

    def __init__(self, request: web.Request, headers: Mapping[str, str], *, send_buffer_bytes: int) -> None:
        self._request = request
        self._send_buffer_bytes = send_buffer_bytes
        self._chunked = request.version >= HttpVersion11
        self._transport = request.transport
        self.opened = False
        self.response = web.StreamResponse(headers={**_HEADERS, **headers})

    async def open(self, first: bytes) -> None:
        """Send status, headers and the first bytes."""
        if self._chunked:
            self.response.enable_chunked_encoding()
        await self.response.prepare(self._request)
        await self.response.write(first)
        self.opened = True

    @property
    def writable(self) -> bool:
        """Whether the reader keeps up."""
        transport = self._transport
        return transport is not None and transport.get_write_buffer_size() < self._send_buffer_bytes

    def send(self, data: bytes) -> None:
        """Write events, after `open`. A connection that is gone is noticed elsewhere: the handler is cancelled."""
        transport = self._transport
        if transport is not None and not transport.is_closing():
            transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    async def close(self, last: bytes, timeout_s: float, *, keep_alive: bool = True) -> bool:
        """Send the last events and end the reply. False: the reader did not take it in time and was cut."""
        if not keep_alive:
            self.response.force_close()
        try:
            async with asyncio.timeout(timeout_s):
                await self.response.write_eof(last)
        except TimeoutError:
            if self._transport is not None:
                self._transport.abort()
            return False
        return True

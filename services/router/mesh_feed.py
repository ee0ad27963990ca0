"""/mesh and /mesh/events: one snapshot a second, taken once for everybody, and none while nobody watches.

A viewer gets the charts' history first, then each snapshot as it is taken. One that reads slowly misses some: nothing
is queued for it. Viewers are bounded (429), and let go when the router drains or hands over: they hold nothing up.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from aiohttp import web

from tokenrelay.base.errors import NotFound, Overloaded
from tokenrelay.base.logging import get_logger
from tokenrelay.services.router.debug import serves_debug
from tokenrelay.services.router.mesh import HIDDEN, Json, MeshView, trail_object
from tokenrelay.services.router.replies import encode, json_response
from tokenrelay.services.router.sse import EventStream, named_event
from tokenrelay.services.router.state import STATE, RouterState

log = get_logger("router")

EVERY_S = 1.0
VIEWERS_MAX = 32
VIEWER_BUFFER_BYTES = 256 << 10
MISSED_MAX = 60  # snapshots that a viewer did not read, one after the other; then it is taken for gone
PATH = "/mesh"


class MeshFeed:
    """The snapshots of one router. Event loop only."""

    def __init__(self, state: RouterState, every_s: float = EVERY_S) -> None:
        self._state = state
        self._every_s = every_s
        self._view = MeshView(state)
        self._latest: Json = {}
        self._event = b""
        self._taken_s = -every_s
        self._taking: asyncio.Task[None] | None = None
        self._ticker: asyncio.Task[None] | None = None
        self._news = asyncio.Event()  # replaced at each snapshot: whoever waits for the old one wakes
        self.viewers = 0
        self.snapshots = 0

    async def latest(self) -> Json:
        """A snapshot that is not older than a second."""
        if time.monotonic() - self._taken_s >= self._every_s:
            if self._taking is None:
                self._taking = asyncio.create_task(self._take(), name="mesh snapshot")
            await asyncio.shield(self._taking)
        return self._latest

    async def _take(self) -> None:
        try:
            self._latest = await self._view.take()
            self._event = named_event("snapshot", encode(self._latest))
        finally:
            self._taken_s = time.monotonic()
            self.snapshots += 1
            self._taking = None

    async def _tick(self) -> None:
        while True:
            try:
                await self.latest()
            except Exception:
                log.exception("a snapshot of the mesh failed")
            news, self._news = self._news, asyncio.Event()
            news.set()
            await asyncio.sleep(max(0.05, self._taken_s + self._every_s - time.monotonic()))

    @asynccontextmanager
    async def _watching(self) -> AsyncIterator[None]:
        """The clock runs while there is a viewer. Raises Overloaded."""
        if self.viewers >= VIEWERS_MAX:
            raise Overloaded(f"{self.viewers} viewers watch already, the most this server takes")
        self.viewers += 1
        if self._ticker is None:
            self._ticker = asyncio.create_task(self._tick(), name="mesh feed")
        try:
            yield
        finally:
            self.viewers -= 1
            if self.viewers == 0 and self._ticker is not None:
                self._ticker.cancel()
                self._ticker = None

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """One viewer, until it leaves or the router ends. Raises Overloaded."""
        config = self._state.config
        async with self._watching():
            await self.latest()
            stream = EventStream(request, {}, send_buffer_bytes=VIEWER_BUFFER_BYTES)
            await stream.open(named_event("history", encode({"points": self._view.history})) + self._event)
            missed = 0
            while missed < MISSED_MAX and not (self._state.draining or self._state.handing_over):
                await self._news.wait()
                missed += 1
                if stream.writable:
                    stream.send(self._event)
                    missed = 0
            await stream.close(named_event("bye", b"{}"), config.send_timeout_s, keep_alive=False)
            return stream.response


FEED: Final = web.AppKey("feed", MeshFeed)


def add(app: web.Application, state: RouterState) -> None:
    """The endpoints."""
    app[FEED] = MeshFeed(state)
    app.add_routes(
        [web.get(PATH, mesh), web.get(f"{PATH}/events", events), web.get(f"{PATH}/requests/{{id:.+}}", request_trail)]
    )


async def mesh(request: web.Request) -> web.Response:
    """GET /mesh: the snapshot, as JSON."""
    return json_response(await request.app[FEED].latest(), headers={"Cache-Control": "no-store"})


async def events(request: web.Request) -> web.StreamResponse:
    """GET /mesh/events: snapshots as server-sent events."""
    return await request.app[FEED].serve(request)


async def request_trail(request: web.Request) -> web.Response:
    """GET /mesh/requests/{id}: one request's way, by its X-Request-Id, as long as it is remembered."""
    state, request_id = request.app[STATE], request.match_info["id"]
    if not serves_debug(state.config):
        raise NotFound(HIDDEN)
    trail = state.pool.trails.find(request_id)
    if trail is None:
        raise NotFound(f"no request {request_id[:128]!r} among the last ones")
    running = next((run for run in state.runs if run.trail is trail), None)
    tokens = trail.output_tokens if running is None else sum(choice.output_tokens for choice in running.choices)
    return json_response(trail_object(trail, tokens))

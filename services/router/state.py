"""What the endpoints share: configuration, workers, metrics, and who is in work."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection
from concurrent.futures import Executor
from pathlib import Path
from typing import Final

from aiohttp import web

from tokenrelay.base.deadlines import Deadline
from tokenrelay.base.errors import Overloaded, Unavailable
from tokenrelay.services.chassis.tracing import Tracer
from tokenrelay.services.router.ceiling import Ceiling
from tokenrelay.services.router.config import RouterConfig
from tokenrelay.services.router.gate import Gate
from tokenrelay.services.router.generation import Run
from tokenrelay.services.router.metrics import Metrics
from tokenrelay.services.router.responses_store import ResponseStore
from tokenrelay.services.router.workers import WorkerPool


class RouterState:
    """One router. Event loop only."""

    def __init__(
        self, config: RouterConfig, pool: WorkerPool, executor: Executor, tracer: Tracer | None = None
    ) -> None:
        """Raises ConfigError for a keys file that cannot be used."""
        self.config = config
        self.gate = Gate(Path(config.keys), keyless=config.keyless) if config.keys else None
        self.pool = pool
        self.executor = executor
        self.tracer = tracer
        self.metrics = Metrics()
        self.metrics.decisions, self.metrics.handovers = pool.handovers.decisions, pool.handovers.ends
        self.ceiling = Ceiling() if config.prefix_ceiling else None
        self.responses = ResponseStore(config.response_store_bytes)
        self.draining = False
        self.handing_over = False  # new connections go to another router; what comes on the old ones is served
        self._open = 0  # generation requests, from admission to reply
        self._runs: set[Run] = set()
        self._quiet = asyncio.Event()
        self._quiet.set()

    def admit(self) -> None:
        """Count a generation request in; `leave` must follow. Raises Unavailable or Overloaded."""
        if self.draining:
            raise Unavailable("the server is shutting down")
        if self._open >= self.config.requests_open_max:
            raise Overloaded(f"{self._open} requests are in work, the most this server takes")
        self._open += 1
        self.metrics.requests_open = self._open
        self._quiet.clear()

    def leave(self) -> None:
        """The request has its reply."""
        self._open -= 1
        self.metrics.requests_open = self._open
        if self._open == 0:
            self._quiet.set()

    @property
    def runs(self) -> Collection[Run]:
        """Those in work."""
        return self._runs

    @property
    def placements(self) -> dict[str, str]:
        """Why prompts of open requests are computed where they are, by request."""
        return {run.request_id: run.placement for run in self._runs if run.placement}

    @property
    def routes(self) -> dict[str, str]:
        """Which worker open requests went to, and why, by request."""
        return {run.request_id: run.route for run in self._runs}

    def opened(self, run: Run) -> None:
        """A run has begun; `closed` must follow."""
        self._runs.add(run)

    def closed(self, run: Run) -> None:
        """It has ended."""
        self._runs.discard(run)

    async def drain(self, deadline: Deadline) -> None:
        """Refuse what is new and wait for what is open; at the deadline the rest gets an error."""
        self.draining = True
        await self.quiet(deadline)

    async def quiet(self, deadline: Deadline) -> None:
        """Wait for what is open; at the deadline the rest gets an error."""
        try:
            await asyncio.wait_for(self._quiet.wait(), deadline.left_s())
        except TimeoutError:
            self.fail_open("the server shut down before the request was done")
            with contextlib.suppress(TimeoutError):  # somebody does not read: the connection is cut in a moment
                await asyncio.wait_for(self._quiet.wait(), self.config.send_timeout_s)

    def fail_open(self, message: str) -> None:
        """Give every open run this error."""
        for run in list(self._runs):
            run.fail(Unavailable(message), "shutdown")


STATE: Final = web.AppKey("state", RouterState)

"""The life of a service process: starting -> ready -> draining -> stopped.

lifecycle = Lifecycle(drain_s=30)
lifecycle.install_signals()
...start...
await lifecycle.wait_drain()        # first SIGTERM
await lifecycle.unless_stopped(servicer.drain(Deadline.after(30)))      # a second one ends the wait
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable
from enum import Enum
from typing import Any

from tokenrelay.base.logging import get_logger

log = get_logger("lifecycle")


class State(Enum):
    """Where a process is in its life."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"


class Lifecycle:
    """Signals and states of one process. The first SIGTERM or SIGINT drains, a second one stops at once."""

    def __init__(self) -> None:
        self.state = State.STARTING
        self.failure: BaseException | None = None
        self._drain = asyncio.Event()
        self._stop = asyncio.Event()

    def install_signals(self) -> None:
        """Handle SIGTERM and SIGINT on the running event loop."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.request_end, number.name)

    def ready(self) -> None:
        """The service takes requests now."""
        if self.state is State.STARTING:
            self.state = State.READY

    def request_end(self, why: str) -> None:
        """Drain; a second request stops at once."""
        if self._drain.is_set():
            log.warning("stopping at once", why=why)
            self._stop.set()
        else:
            log.info("draining", why=why)
            self.state = State.DRAINING
            self._drain.set()

    def fail(self, error: BaseException) -> None:
        """Something failed for good: do not drain."""
        log.error("stopping", error=repr(error))
        self.failure = self.failure or error
        self._drain.set()
        self._stop.set()

    @property
    def stopping(self) -> bool:
        """Whether to stop at once."""
        return self._stop.is_set()

    async def wait_drain(self) -> None:
        """Until the process is asked to end."""
        await self._drain.wait()

    async def unless_stopped(self, work: Awaitable[Any]) -> bool:
        """Run `work`, but give it up when asked to stop at once. True when it was finished; raises what it raised."""
        return await _unless(self._stop, work)

    async def unless_ended(self, work: Awaitable[Any]) -> bool:
        """The same, but given up at the first request to end: for work that comes before there is anything to drain."""
        return await _unless(self._drain, work)


async def _unless(event: asyncio.Event, work: Awaitable[Any]) -> bool:
    task, given_up = asyncio.ensure_future(work), asyncio.ensure_future(event.wait())
    await asyncio.wait([task, given_up], return_when=asyncio.FIRST_COMPLETED)
    given_up.cancel()
    if task.done():
        task.result()
        return True
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    return False

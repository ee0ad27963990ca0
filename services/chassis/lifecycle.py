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
from collections.abc import Coroutine
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

    def stop_now(self, why: str) -> None:
        """Something failed for good: do not drain."""
        log.error("stopping", why=why)
        self._drain.set()
        self._stop.set()

    @property
    def stopping(self) -> bool:
        """Whether to stop at once."""
        return self._stop.is_set()

    async def wait_drain(self) -> None:
        """Until the process is asked to end."""
        await self._drain.wait()

    async def unless_stopped(self, work: Coroutine[Any, Any, None]) -> bool:
        """Run `work`, but give it up when asked to stop at once. True when it was finished."""
        task = asyncio.create_task(work)
        stop = asyncio.create_task(self._stop.wait())
        await asyncio.wait([task, stop], return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if task.done():
            task.result()
            return True
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return False

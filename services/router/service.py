"""The router process: start, serve, drain, stop.

service = RouterService(config)
port = await service.start()
...
await service.drain(); await service.stop()

or, as a process: `await run(config, StatusPipe(fd))`.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aiohttp import web

from tokenrelay.base.deadlines import Deadline
from tokenrelay.base.errors import ConfigError
from tokenrelay.base.logging import get_logger
from tokenrelay.base.status import StatusPipe
from tokenrelay.services.chassis.lifecycle import Lifecycle
from tokenrelay.services.chassis.security import Security
from tokenrelay.services.chassis.tracing import Tracer
from tokenrelay.services.router.app import create_app
from tokenrelay.services.router.config import RouterConfig
from tokenrelay.services.router.debug import is_loopback
from tokenrelay.services.router.door import DoorRunner, tls_context
from tokenrelay.services.router.members import Members
from tokenrelay.services.router.state import RouterState
from tokenrelay.services.router.workers import WorkerPool

log = get_logger("router")

THREADS = 2  # long tokenizations at once; they let go of the interpreter's lock
KEEPALIVE_TIMEOUT_S = 75.0
CONNECTIONS_LOOK_S = 0.1
FIRST_WORKER_S = 5.0
STOP_GRACE_S = 1.0  # for handlers that were told to end
BACKLOG = 1024


class RouterService:
    """One router, from start to stop."""

    def __init__(self, config: RouterConfig, security: Security | None = None, tracer: Tracer | None = None) -> None:
        """`security`: towards workers and kvstores. Raises ConfigError for keys or certificates that are of no use."""
        self._config = config
        security = security or Security()
        self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix="router")
        self.pool = WorkerPool(config, self._executor, security)
        self.members = Members(self.pool, config, security) if config.kvstore else None
        self.state = RouterState(config, self.pool, self._executor, tracer)
        self._site: web.BaseSite | None = None
        self._tls = tls_context(config)
        self._runner = DoorRunner(
            create_app(self.state),
            connections_max=config.connections_max,
            head_timeout_s=config.head_timeout_s,
            handler_cancellation=True,
            access_log=None,
            keepalive_timeout=KEEPALIVE_TIMEOUT_S,
            shutdown_timeout=STOP_GRACE_S,
        )

    async def start(self, listening: socket.socket | None = None) -> int:
        """Bind and begin to connect to the workers; the port in use. Raises ConfigError that names the address.

        `listening`: a socket that somebody else bound, and that another router may still accept from. There a
        connection can wait, so that none is taken before a worker is there to serve it (or `FIRST_WORKER_S` are over).
        """
        await self._runner.setup()
        config = self._config
        try:
            if listening is not None:
                await self._find_workers()
                await self.pool.wait_usable(FIRST_WORKER_S)
                self._site = web.SockSite(self._runner, listening, backlog=BACKLOG, ssl_context=self._tls)
            else:
                self._site = web.TCPSite(self._runner, config.host, config.port, backlog=BACKLOG, ssl_context=self._tls)
            await self._site.start()
        except OSError as error:
            await self._runner.cleanup()
            reason = error.strerror or str(error)
            raise ConfigError(f"cannot listen on {config.host} port {config.port}: {reason}") from error
        if listening is None:
            await self._find_workers()
        return int(self._runner.addresses[0][1])

    async def _find_workers(self) -> None:
        await self.pool.start()
        if self.members is not None:
            await self.members.start()

    async def hand_over(self) -> None:
        """Another router accepts from the same socket: leave new connections to it, and serve what still comes on the
        old ones, each reply the last of its connection, until they have all gone or `drain_s` is over. An idle one is
        not closed before: its client might be sending its next request at this moment.
        """
        assert self._site is not None, "started"
        await self._site.stop()
        self.state.handing_over = True
        deadline = Deadline.after(self._config.drain_s)
        while self._runner.connections_open and not deadline.passed:  # noqa: ASYNC110 - aiohttp has no event for it
            await asyncio.sleep(CONNECTIONS_LOOK_S)
        await self.state.quiet(deadline)

    async def drain(self) -> None:
        """Answer /ready and new requests with 503, and wait for the open ones, `drain_s` at most."""
        await self.state.drain(Deadline.after(self._config.drain_s))

    async def stop(self) -> None:
        """End everything now; requests that are still open get a terminal error."""
        self.state.draining = True
        self.state.fail_open("the server is shutting down")
        await asyncio.sleep(0)  # the handlers write it
        await self._runner.cleanup()
        if self.members is not None:
            await self.members.close()
        await self.pool.close()
        if self.state.tracer is not None:
            await asyncio.to_thread(self.state.tracer.close)
        self._executor.shutdown(wait=False, cancel_futures=True)


async def run(
    config: RouterConfig,
    status: StatusPipe,
    listening: socket.socket | None = None,
    security: Security | None = None,
    tracer: Tracer | None = None,
) -> None:
    """The life of the process: ready when the port accepts, ended by signals. SIGUSR1 hands over to the next router."""
    lifecycle = Lifecycle()
    lifecycle.install_signals()
    handing_over = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, handing_over.set)
    service = RouterService(config, security, tracer)
    port = await service.start(listening)
    lifecycle.ready()
    log.info(
        "listening", host=config.host, port=port, workers=",".join(config.targets), kvstore=",".join(config.kvstore)
    )
    if config.keys and not config.tls_certificate and not is_loopback(config.host):
        log.warning("keys travel in the clear: no tls_certificate is set, unless a proxy before this router has one")
    gc.collect()
    gc.freeze()  # modules and classes stay: no collection need look at them again
    status.ready(port=port)
    try:
        await first_of(lifecycle.wait_drain(), handing_over.wait())
        if handing_over.is_set():
            await lifecycle.unless_stopped(service.hand_over())
        else:
            await lifecycle.unless_stopped(service.drain())
    finally:
        await service.stop()


async def first_of(*waits: Coroutine[Any, Any, object]) -> None:
    """Return when the first of them has; the others are cancelled."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()

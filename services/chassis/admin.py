"""A small HTTP port beside a gRPC service: /health, /ready and /metrics, for orchestrators and scrapers.

    admin = AdminServer("0.0.0.0", 9100, ready=lambda: (True, ""), metrics=page)
    port = await admin.start()

/health is 200 while the event loop turns. /ready is 200, or 503 with the reason. /metrics is what `metrics` returns, in
Prometheus' text format (exposition format 0.0.4).
"""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web

from tokenrelay.base.errors import ConfigError

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SHUTDOWN_S = 0.5


class AdminServer:
    """One port; tells nothing that a stranger must not know."""

    def __init__(
        self, host: str, port: int, *, ready: Callable[[], tuple[bool, str]], metrics: Callable[[], str]
    ) -> None:
        self._host, self._port = host, port
        self._ready, self._metrics = ready, metrics
        app = web.Application()
        app.router.add_get("/health", self._get_health)
        app.router.add_get("/ready", self._get_ready)
        app.router.add_get("/metrics", self._get_metrics)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_S)

    async def start(self) -> int:
        """Listen; the port in use. Raises ConfigError that names the address."""
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._host, self._port).start()
        except OSError as error:
            await self._runner.cleanup()
            reason = error.strerror or str(error)
            raise ConfigError(f"cannot listen on {self._host} port {self._port}: {reason}") from error
        return int(self._runner.addresses[0][1])

    async def stop(self) -> None:
        """Close the port."""
        await self._runner.cleanup()

    async def _get_health(self, request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _get_ready(self, request: web.Request) -> web.Response:
        ready, reason = self._ready()
        return web.Response(status=200 if ready else 503, text=f"{'ready' if ready else reason}\n")

    async def _get_metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=self._metrics().encode(), headers={"Content-Type": CONTENT_TYPE})

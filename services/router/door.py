"""Connections before their first request: TLS, how many there are, and how long they may take to say something.

    context = tls_context(config)                       # None: plain HTTP
    runner = DoorRunner(app, connections_max=…, head_timeout_s=10, …)    # an aiohttp AppRunner

aiohttp bounds headers (8,190 bytes a line, 128 lines), idle connections between requests and, in body.py, bodies; a
connection that never completes its first head would stay for ever. Here a connection has a guard until then, who steps
aside afterwards: requests pay nothing for it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import ssl
import time
from collections.abc import Callable
from typing import Any, cast

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from tokenrelay.base.errors import ConfigError
from tokenrelay.base.logging import get_logger
from tokenrelay.services.router.config import RouterConfig

log = get_logger("router")

COMPLAIN_S = 10.0  # between two lines about heads that are no HTTP
_END_OF_HEAD = b"\r\n\r\n"
_LATE = b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


def tls_context(config: RouterConfig) -> ssl.SSLContext | None:
    """The server's side of TLS 1.2 and later; None: plain HTTP. Raises ConfigError that names the setting."""
    if not (config.tls_certificate or config.tls_key):
        return None
    if not (config.tls_certificate and config.tls_key):
        missing = "tls_key" if config.tls_certificate else "tls_certificate"
        raise ConfigError(f"TLS takes a certificate and its key: router.{missing} is missing")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(config.tls_certificate, config.tls_key)
    except ssl.SSLError as error:
        files = f"{config.tls_certificate} and {config.tls_key}"
        raise ConfigError(f"router.tls_certificate, router.tls_key: {files} do not make a pair: {error}") from error
    except OSError as error:
        files = f"{config.tls_certificate} or {config.tls_key}"
        raise ConfigError(f"router.tls_certificate, router.tls_key: cannot read {files}: {error.strerror}") from error
    return context


class DoorRunner(web.AppRunner):
    """Makes its connections pass the guard."""

    def __init__(self, app: web.Application, *, connections_max: int, head_timeout_s: float, **settings: Any) -> None:
        self.log = DoorLog()
        super().__init__(app, logger=self.log, **settings)
        self._connections_max = connections_max
        self._head_timeout_s = head_timeout_s

    @property
    def connections_open(self) -> int:
        """Connections at the moment."""
        server = super().server
        return len(server.connections) if server is not None else 0

    @property
    def server(self) -> web.Server | None:
        """What a site calls for each connection."""
        server = super().server
        if server is None:
            return None

        def guarded() -> asyncio.Protocol:
            return _Guard(server(), self._admits, self._head_timeout_s)

        return cast("web.Server", guarded)

    def _admits(self) -> bool:
        return self.connections_open <= self._connections_max  # the new one is among them


class DoorLog(logging.LoggerAdapter[logging.Logger]):
    """What aiohttp says of its connections. Anybody can send what is no HTTP: that is a line now and then, and neither
    bytes of a stranger nor a traceback.
    """

    def __init__(self) -> None:
        super().__init__(logging.getLogger("tokenrelay.router"), {})
        self.malformed = 0
        self._complained_s = -math.inf

    def exception(self, msg: object, *args: object, **kwargs: Any) -> None:
        """A request could not be handled."""
        if not isinstance(kwargs.get("exc_info"), HttpProcessingError):
            super().exception(msg, *args, **kwargs)
            return
        self.malformed += 1
        now_s = time.monotonic()
        if now_s - self._complained_s >= COMPLAIN_S:
            self._complained_s = now_s
            log.warning("a head that is no HTTP", malformed=self.malformed)


class _Guard(asyncio.Protocol):
    """Stands before aiohttp's protocol until the first head is whole."""

    __slots__ = ("_admits", "_inner", "_seen", "_tail", "_timeout_s", "_timer", "_transport")

    def __init__(self, inner: asyncio.Protocol, admits: Callable[[], bool], timeout_s: float) -> None:
        self._inner = inner
        self._admits = admits
        self._timeout_s = timeout_s
        self._tail = b""
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._inner.connection_made(transport)
        if not self._admits():
            self._transport.abort()
            return
        self._timer = asyncio.get_running_loop().call_later(self._timeout_s, self._late)

    def data_received(self, data: bytes) -> None:
        window = self._tail + data
        if _END_OF_HEAD in window:
            self._stop()
            if self._transport is not None:
                self._transport.set_protocol(self._inner)
        else:
            self._tail = window[1 - len(_END_OF_HEAD) :]
        self._inner.data_received(data)

    def _late(self) -> None:
        transport = self._transport
        if transport is not None and not transport.is_closing():
            if self._tail:
                transport.write(_LATE)
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        self._inner.connection_lost(exc)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

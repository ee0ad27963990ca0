"""Pages of other origins in a browser: refused by the browser, unless `cors_origins` names them.

Source: the Fetch standard, https://fetch.spec.whatwg.org/#http-cors-protocol. Keys travel in a header that a page sets
itself, so that no reply allows credentials.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from aiohttp import web

from tokenrelay.base.errors import ConfigError

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
PREFLIGHT_AGE_S = 600
EXPOSED = "X-Request-Id, Request-Id, Retry-After"
_METHODS = "GET, POST, DELETE, OPTIONS"


class Cors:
    """Answers preflights, and marks replies as readable for the origins it was given."""

    def __init__(self, origins: tuple[str, ...]) -> None:
        """Raises ConfigError for what is no origin."""
        for origin in origins:
            parts = urlsplit(origin)
            if origin != "*" and (not parts.scheme or not parts.netloc or f"{parts.scheme}://{parts.netloc}" != origin):
                raise ConfigError(
                    f"router.cors_origins has {origin!r}, expected * or an origin as https://page.example"
                )
        self._all = "*" in origins
        self._origins = frozenset(origins)

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """A preflight is answered here, without a key: a browser sends none with it."""
        origin = request.headers.get("Origin")
        if origin is None or not (self._all or origin in self._origins):
            return await handler(request)
        request["cors"] = "*" if self._all else origin
        if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
            return web.Response(status=204, headers=self._preflight(request))
        return await handler(request)

    def _preflight(self, request: web.Request) -> dict[str, str]:
        asked = request.headers.get("Access-Control-Request-Headers", "")
        headers = {"Access-Control-Allow-Methods": _METHODS, "Access-Control-Max-Age": str(PREFLIGHT_AGE_S)}
        return {**headers, "Access-Control-Allow-Headers": asked} if asked else headers


async def mark(request: web.Request, response: web.StreamResponse) -> None:
    """On each reply, errors and streams alike."""
    allowed = request.get("cors")
    if allowed is not None:
        response.headers["Access-Control-Allow-Origin"] = allowed
        response.headers["Access-Control-Expose-Headers"] = EXPOSED
        response.headers["Vary"] = "Origin"

"""The page at /: files of the package, served as they are, with a policy that lets nothing else in.

The files are read once and kept (a few tens of kB); browsers ask again each time and get a 304 for what they have.
Nothing here needs a key: the page holds no data of its own, and asks for a key when /mesh wants one.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from aiohttp import web

from tokenrelay.base.errors import NotFound

FOLDER: Final = Path(__file__).parent / "dashboard"
TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Nothing from elsewhere, no inline script or style, no frame around it.
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS: Final = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class Asset:
    """One file."""

    body: bytes
    content_type: str
    etag: str


@functools.cache
def assets() -> dict[str, Asset]:
    """Every file by its name."""
    found = {}
    for path in sorted(FOLDER.iterdir()):
        if path.suffix in TYPES:
            body = path.read_bytes()
            found[path.name] = Asset(body, TYPES[path.suffix], f'"{hashlib.blake2b(body, digest_size=12).hexdigest()}"')
    return found


def routes() -> list[web.RouteDef]:
    """The page and its files."""
    return [web.get("/", index), web.get("/page/{name}", one)]


async def index(request: web.Request) -> web.Response:
    """GET /: the page."""
    return _reply(request, assets()["index.html"])


async def one(request: web.Request) -> web.Response:
    """GET /page/{name}: one of its files."""
    asset = assets().get(request.match_info["name"])
    if asset is None:
        raise NotFound(f"there is nothing at {request.path[:256]}")
    return _reply(request, asset)


def _reply(request: web.Request, asset: Asset) -> web.Response:
    headers = {**HEADERS, "ETag": asset.etag}
    if request.headers.get("If-None-Match") == asset.etag:
        return web.Response(status=304, headers=headers)
    return web.Response(body=asset.body, headers={**headers, "Content-Type": asset.content_type})

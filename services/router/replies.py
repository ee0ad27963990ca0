"""Errors and JSON replies in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import math
from typing import Any

import msgspec
from aiohttp import web

from tokenrelay.base.errors import (
    DeadlineExceeded,
    Forbidden,
    InvalidRequest,
    NotFound,
    Overloaded,
    TokenRelayError,
    Unauthenticated,
    Unavailable,
)

encode = msgspec.json.encode

# Most specific first.
_STATUS: tuple[tuple[type[TokenRelayError], int, str], ...] = (
    (NotFound, 404, "invalid_request_error"),
    (InvalidRequest, 400, "invalid_request_error"),
    (Unauthenticated, 401, "invalid_request_error"),
    (Forbidden, 403, "invalid_request_error"),
    (Overloaded, 429, "rate_limit_error"),
    (Unavailable, 503, "service_unavailable_error"),
    (DeadlineExceeded, 504, "timeout_error"),
    (TokenRelayError, 500, "server_error"),
)
RETRY_UNAVAILABLE_S = 2  # a worker that died is back after about so long


class BodyTooLarge(InvalidRequest):
    """The HTTP body is over the operator's bound."""

    code = "body_too_large"


def status_of(error: TokenRelayError) -> int:
    """The HTTP status that says this."""
    if isinstance(error, BodyTooLarge):
        return 413
    return next(status for kind, status, _ in _STATUS if isinstance(error, kind))


def error_object(error: TokenRelayError) -> dict[str, Any]:
    """The body that says this, for JSON and for SSE."""
    kind = next(kind for cls, _, kind in _STATUS if isinstance(error, cls))
    param = error.param if isinstance(error, InvalidRequest) else None
    return {"error": {"message": error.message, "type": kind, "param": param, "code": error.code}}


def error_response(error: TokenRelayError) -> web.Response:
    """The reply that says this, with Retry-After where trying again may help."""
    headers = {}
    if isinstance(error, Overloaded):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    elif isinstance(error, Unavailable):
        headers["Retry-After"] = str(RETRY_UNAVAILABLE_S)
    elif isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"  # RFC 6750
    return json_response(error_object(error), status=status_of(error), headers=headers)


def json_response(value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """A JSON reply."""
    return web.Response(body=encode(value), status=status, headers=headers, content_type="application/json")

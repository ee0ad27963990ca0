"""Errors in Anthropic's shape: `{"type": "error", "error": {"type", "message"}, "request_id"}`.

Source: https://docs.anthropic.com/en/api/errors. A client reads the status and `error.type`; Claude Code shortens its
conversation when the message begins with "prompt is too long".
"""

from __future__ import annotations

import re
from typing import Any

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
from tokenrelay.services.router.replies import BodyTooLarge, encode, error_response, json_response
from tokenrelay.services.router.sse import named_event

# Most specific first.
_KINDS: tuple[tuple[type[TokenRelayError], int, str], ...] = (
    (BodyTooLarge, 413, "request_too_large"),
    (NotFound, 404, "not_found_error"),
    (InvalidRequest, 400, "invalid_request_error"),
    (Unauthenticated, 401, "authentication_error"),
    (Forbidden, 403, "permission_error"),
    (Overloaded, 429, "rate_limit_error"),
    (Unavailable, 503, "overloaded_error"),
    (DeadlineExceeded, 504, "timeout_error"),
    (TokenRelayError, 500, "api_error"),
)
# Where a field has another name here than in the request that the router serves.
_NAMES = {"stop": "stop_sequences", "response_format": "output_config.format"}
_INDEX = re.compile(r"\[(\d+)\]")
_UNKNOWN = re.compile(r"Object contains unknown field `(\w+)`")
_MISSING = re.compile(r"Object missing required field `\w+`")


def _kind(error: TokenRelayError) -> tuple[int, str]:
    return next((status, kind) for cls, status, kind in _KINDS if isinstance(error, cls))


def message_of(error: TokenRelayError) -> str:
    """The message, with the field spelled as Anthropic's API spells it."""
    message = error.message
    if not isinstance(error, InvalidRequest):
        return message
    if error.code == "context_length_exceeded":
        return f"prompt is too long: {message}"
    unknown = _UNKNOWN.search(message)
    if unknown:
        path = ".".join(filter(None, (error.param, unknown.group(1))))
        return f"{path}: Extra inputs are not permitted"
    param = error.param
    if not param:
        return message
    head, bracket, rest = param.partition("[")
    spelled = _INDEX.sub(r".\1", _NAMES.get(head, head) + bracket + rest)
    message = _MISSING.sub("Field required", message)
    if message.startswith(param):
        return spelled + message[len(param) :]
    return message


def error_body(error: TokenRelayError, request_id: str) -> dict[str, Any]:
    """The body that says this, for JSON and for SSE."""
    return {
        "type": "error",
        "error": {"type": _kind(error)[1], "message": message_of(error)},
        "request_id": request_id,
    }


def error_event(error: TokenRelayError, request_id: str) -> bytes:
    """What ends a stream."""
    return named_event("error", encode(error_body(error, request_id)))


def error_reply(error: TokenRelayError, request_id: str) -> web.Response:
    """The reply that says this."""
    passed = ("Retry-After", "WWW-Authenticate")
    headers = {name: value for name, value in error_response(error).headers.items() if name in passed}
    return json_response(error_body(error, request_id), status=_kind(error)[0], headers=headers)

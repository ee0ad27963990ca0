"""GET /openapi.json: the API as an OpenAPI 3.1 document, made from the types that bodies are parsed into.

It says what may be sent, fields that are refused included: each of those is a 400 that names it (docs/api.md). Replies
are described by their status, and errors by their shape.
"""

from __future__ import annotations

import functools
from typing import Any

import msgspec
from aiohttp import web

from tokenrelay.base.version import version
from tokenrelay.services.router import limits
from tokenrelay.services.router.gate import EXPECTED_HEADER, PRIORITY_HEADER, SESSION_HEADER, TPS_FLOOR_HEADER
from tokenrelay.services.router.messages_types import CountTokensRequest, MessagesRequest
from tokenrelay.services.router.openai_types import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from tokenrelay.services.router.replies import encode
from tokenrelay.services.router.responses_types import ResponsesRequest

PATH = "/openapi.json"


def _range(bounds: tuple[int, int]) -> dict[str, Any]:
    return {"type": "integer", "minimum": bounds[0], "maximum": bounds[1]}


_POSTS: dict[str, tuple[type, str]] = {
    "/v1/chat/completions": (ChatRequest, "A chat completion; with `stream` as server-sent events."),
    "/v1/completions": (CompletionRequest, "A text completion; with `stream` as server-sent events."),
    "/v1/responses": (ResponsesRequest, "A response, as OpenAI's Responses API has it."),
    "/v1/messages": (MessagesRequest, "A message, as Anthropic's Messages API has it."),
    "/v1/messages/count_tokens": (CountTokensRequest, "How many tokens a prompt of these messages has."),
    "/tokenize": (TokenizeRequest, "Token ids of a prompt, or of messages."),
    "/detokenize": (DetokenizeRequest, "The text of token ids."),
}
_GETS: dict[str, str] = {
    "/v1/models": "The models that are served.",
    "/health": "The process lives.",
    "/ready": "Requests would be served now.",
    "/version": "The version.",
    "/metrics": "Counters, for Prometheus.",
}
_NAMED: dict[str, tuple[str, tuple[str, ...], str]] = {
    "/v1/models/{name}": ("name", ("get",), "One model."),
    "/v1/responses/{id}": ("id", ("get", "delete"), "A response that this router keeps."),
}
_GENERATING = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
# Headers that stand for fields of a generating request's body, and go before them.
_HEADERS: dict[str, tuple[dict[str, Any], str]] = {
    SESSION_HEADER: ({"type": "string"}, "Names the session, whose requests go to the worker that has its prefix."),
    PRIORITY_HEADER: (_range(limits.PRIORITY), "As `priority`: lower runs first."),
    TPS_FLOOR_HEADER: (_range(limits.TPS_FLOOR), "As `tps_floor`: tokens a second that this answer's reader needs."),
    EXPECTED_HEADER: (_range(limits.EXPECTED_TOKENS), "As `expected_output_tokens`: how long it will likely be."),
}
_STATUS = {
    "400": "something about the request is wrong; the error names it",
    "401": "with keys: none, or a wrong one",
    "404": "there is no such thing",
    "413": "the body is too large",
    "429": "over a limit, or too busy; Retry-After says when to come again",
    "503": "no worker takes requests now",
    "504": "it was not done in time",
}


# What fields take beyond their type, in every API that has them; docs/api.md says the rest.
_BOUNDS: dict[str, tuple[float, float]] = {
    "temperature": limits.TEMPERATURE,
    "top_p": (0, 1),
    "min_p": (0, 1),
    "top_k": (-1, limits.TOP_K_MAX),
    "presence_penalty": limits.PENALTY,
    "frequency_penalty": limits.PENALTY,
    "repetition_penalty": limits.REPETITION_PENALTY,
    "n": (1, limits.CHOICES_MAX),
    "top_logprobs": (0, limits.TOP_LOGPROBS_MAX),
    "seed": limits.SEED,
    "priority": limits.PRIORITY,
    "tps_floor": limits.TPS_FLOOR,
    "expected_output_tokens": limits.EXPECTED_TOKENS,
    "thinking_token_budget": limits.THINKING_BUDGET,
}


def _bound(schema: dict[str, Any]) -> None:
    """Write the bounds into an object's numbers."""
    for name, field in schema.get("properties", {}).items():
        if name in _BOUNDS:
            for one in field.get("anyOf", [field]):
                if one.get("type") in ("integer", "number"):
                    one["minimum"], one["maximum"] = _BOUNDS[name]


def _header_parameters() -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "header", "required": False, "schema": schema, "description": said}
        for name, (schema, said) in _HEADERS.items()
    ]


def _responses() -> dict[str, Any]:
    json_body = {"application/json": {"schema": {"type": "object"}}}
    errors = {status: {"description": said, "content": json_body} for status, said in _STATUS.items()}
    return {"200": {"description": "the reply"}, **errors}


@functools.cache
def document() -> bytes:
    """The document, encoded."""
    types = [kind for kind, _ in _POSTS.values()]
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    for component in components.values():
        _bound(component)
    paths: dict[str, dict[str, Any]] = {}
    for (path, (_, summary)), schema in zip(_POSTS.items(), schemas, strict=True):
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        operation: dict[str, Any] = {"summary": summary, "requestBody": body, "responses": _responses()}
        if path in _GENERATING:
            operation["parameters"] = _header_parameters()
        paths[path] = {"post": operation}
    for path, summary in _GETS.items():
        paths[path] = {"get": {"summary": summary, "responses": _responses()}}
    for path, (name, methods, summary) in _NAMED.items():
        parameter = {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        named = {"summary": summary, "parameters": [parameter], "responses": _responses()}
        paths[path] = dict.fromkeys(methods, named)
    keys = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    return encode(
        {
            "openapi": "3.1.0",
            "info": {"title": "TokenRelay", "version": version()},
            "paths": paths,
            "components": {"schemas": components, "securitySchemes": keys},
            "security": [{}, {"bearer": []}, {"key": []}],
        }
    )


async def serve(request: web.Request) -> web.Response:
    """GET /openapi.json."""
    return web.Response(body=document(), content_type="application/json")

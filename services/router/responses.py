"""OpenAI's Responses API: /v1/responses, a thin adapter onto chat completions."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from tokenrelay.base.errors import InvalidRequest, NotFound
from tokenrelay.services.router.body import read_body, tenant_of
from tokenrelay.services.router.generate import admitted, serve_chat
from tokenrelay.services.router.generation import Run
from tokenrelay.services.router.replies import encode, json_response
from tokenrelay.services.router.responses_request import Items, chat_request, check, renamed
from tokenrelay.services.router.responses_shape import ResponsesShape
from tokenrelay.services.router.responses_store import Stored
from tokenrelay.services.router.responses_types import ResponsesRequest
from tokenrelay.services.router.state import STATE, RouterState
from tokenrelay.services.router.validate import decode

PATH = "/v1/responses"


async def responses(request: web.Request) -> web.StreamResponse:
    """POST /v1/responses."""
    return await admitted(request, _responses)


async def _responses(request: web.Request, state: RouterState, arrived_s: float) -> web.StreamResponse:
    raw = await read_body(request)
    body = decode(raw, ResponsesRequest)
    check(body)
    tenant = tenant_of(request, b"")
    items = _items(state, tenant, body)

    def keep(reply: dict[str, Any]) -> None:
        if body.store is not False:
            _store(state, tenant, items, reply)

    def make_shape(run: Run, reply_id: str) -> ResponsesShape:
        return ResponsesShape(run, reply_id, body, keep)

    try:
        return await serve_chat(request, state, chat_request(body, items), len(raw), make_shape, "resp", arrived_s)
    except InvalidRequest as error:
        raise renamed(error) from error


def _items(state: RouterState, tenant: bytes, body: ResponsesRequest) -> Items:
    """The conversation: what was stored, and what is new."""
    before = body.previous_response_id
    if before is None:
        items = Items()
    else:
        stored = state.responses.get(tenant, before)
        if stored is None:
            raise InvalidRequest(
                f"Previous response with id {before[:128]!r} not found; this server keeps them for a while",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        items = Items(stored.messages, stored.unanswered)
    items.add_input(body.input)
    return items


def _store(state: RouterState, tenant: bytes, items: Items, reply: dict[str, Any]) -> None:
    whole = Items(items.messages)
    for item in reply["output"]:
        if item["type"] != "function_call" or item["status"] == "completed":
            whole.add(item, "output")
    stored = Stored(reply["id"], tuple(whole.messages), frozenset(whole.unanswered), encode(reply))
    state.responses.put(tenant, stored)


async def one_response(request: web.Request) -> web.Response:
    """GET /v1/responses/{id}."""
    response_id = request.match_info["id"]
    stored = request.app[STATE].responses.get(tenant_of(request, b""), response_id)
    if stored is None:
        raise _gone(response_id)
    return web.Response(body=stored.reply, content_type="application/json")


async def delete_response(request: web.Request) -> web.Response:
    """DELETE /v1/responses/{id}."""
    response_id = request.match_info["id"]
    if not request.app[STATE].responses.drop(tenant_of(request, b""), response_id):
        raise _gone(response_id)
    return json_response({"id": response_id, "object": "response", "deleted": True})


def _gone(response_id: str) -> NotFound:
    return NotFound(f"Response with id {response_id[:128]!r} not found.", param="response_id")

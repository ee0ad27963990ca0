"""Anthropic's Messages API: /v1/messages and /v1/messages/count_tokens, a thin adapter onto chat completions."""

from __future__ import annotations

import datetime

from aiohttp import web

from tokenrelay.services.router.body import read_body, render_messages
from tokenrelay.services.router.gate import salt_of
from tokenrelay.services.router.generate import admitted, encode_prompt, serve_chat
from tokenrelay.services.router.generation import Run
from tokenrelay.services.router.messages_request import chat_request, hints_cache
from tokenrelay.services.router.messages_shape import MessagesShape
from tokenrelay.services.router.messages_types import (
    BetaCountTokensRequest,
    BetaMessagesRequest,
    CountTokensRequest,
    MessagesRequest,
)
from tokenrelay.services.router.model import ServedModel
from tokenrelay.services.router.replies import json_response
from tokenrelay.services.router.state import STATE, RouterState
from tokenrelay.services.router.validate import decode

PATH = "/v1/messages"


async def messages(request: web.Request) -> web.StreamResponse:
    """POST /v1/messages."""
    return await admitted(request, _messages)


async def _messages(request: web.Request, state: RouterState, arrived_s: float) -> web.StreamResponse:
    raw = await read_body(request)
    body = decode(raw, BetaMessagesRequest if "anthropic-beta" in request.headers else MessagesRequest)
    hinted = hints_cache(body)

    def make_shape(run: Run, reply_id: str) -> MessagesShape:
        return MessagesShape(run, reply_id, hints_cache=hinted)

    return await serve_chat(request, state, chat_request(body), len(raw), make_shape, "msg", arrived_s)


async def count_tokens(request: web.Request) -> web.Response:
    """POST /v1/messages/count_tokens: how many tokens the prompt of these messages has."""
    state = request.app[STATE]
    raw = await read_body(request)
    body = decode(raw, BetaCountTokensRequest if "anthropic-beta" in request.headers else CountTokensRequest)
    model = state.pool.require_model()
    model.check_name(body.model)
    text, _ = await render_messages(state, model, chat_request(body), len(raw))
    model.check_text(text, "messages")
    packed = await encode_prompt(model, text, "messages", add_special_tokens=False, salt=salt_of(request))
    return json_response({"input_tokens": len(packed) // 4})


def is_anthropic(request: web.Request) -> bool:
    """Whether a path that both APIs have was asked for by a client of Anthropic's."""
    return "anthropic-version" in request.headers


def model_object(model: ServedModel, name: str) -> dict[str, object]:
    """An entry of /v1/models as Anthropic has it."""
    created = datetime.datetime.fromtimestamp(model.created, datetime.UTC)
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": created.isoformat().replace("+00:00", "Z"),
        "max_input_tokens": model.context_tokens,
    }

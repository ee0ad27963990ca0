"""What every endpoint does with a request first: its body, its id, its messages as a prompt."""

from __future__ import annotations

import asyncio
import hashlib
import re
from typing import Any

import aiohttp
from aiohttp import web

from tokenrelay.base.errors import DeadlineExceeded, InvalidRequest
from tokenrelay.base.ids import request_id as new_request_id
from tokenrelay.services.router import limits
from tokenrelay.services.router.conversation import (
    template_messages,
    template_tools,
    template_variables,
    tools_in_force,
)
from tokenrelay.services.router.gate import caller_of
from tokenrelay.services.router.model import ServedModel
from tokenrelay.services.router.openai_types import ChatRequest, TokenizeRequest
from tokenrelay.services.router.replies import BodyTooLarge
from tokenrelay.services.router.state import STATE, RouterState

_REQUEST_ID = re.compile(rf"[\w.:/-]{{1,{limits.REQUEST_ID_CHARS_MAX}}}", re.ASCII)


async def read_body(request: web.Request) -> bytes:
    """The whole body. Raises BodyTooLarge, DeadlineExceeded, or InvalidRequest for one that is cut or badly encoded."""
    timeout_s = request.app[STATE].config.body_timeout_s
    try:
        async with asyncio.timeout(timeout_s):
            return await request.read()
    except web.HTTPRequestEntityTooLarge as error:
        raise BodyTooLarge(f"the body is larger than {request.client_max_size} bytes") from error
    except TimeoutError as error:
        raise DeadlineExceeded(f"the body did not arrive in {timeout_s:g} s") from error
    except (aiohttp.ClientPayloadError, web.RequestPayloadError, aiohttp.http.HttpProcessingError) as error:
        raise InvalidRequest(f"the body cannot be read: {error}", code="invalid_body") from error


def request_id_of(request: web.Request) -> str:
    """The client's X-Request-Id where it is a plain word, else a new one; the same for the life of the request."""
    known: str | None = request.get("request_id")
    if known is None:
        given = request.headers.get("X-Request-Id", "")
        known = request["request_id"] = given if _REQUEST_ID.fullmatch(given) else new_request_id()
    return known


def tenant_of(request: web.Request, salt: bytes) -> bytes:
    """Whose request it is, for fair shares: 16 bytes; empty without a key. The tenant of a key that the gate let in,
    else made from whatever the client shows and the cache salt.

    A digest: a worker needs to tell keys apart, and to know none.
    """
    caller = caller_of(request)
    if caller is not None:
        return caller.tenant
    given = request.headers.get("Authorization", "") or request.headers.get(
        "X-Api-Key", ""
    )  # the latter is Anthropic's
    key = given.encode("utf-8", "surrogateescape")
    return hashlib.blake2b(salt, digest_size=16, key=hashlib.sha256(key).digest()).digest() if key else b""


async def render_messages(
    state: RouterState, model: ServedModel, body: ChatRequest | TokenizeRequest, size: int
) -> tuple[str, list[dict[str, Any]] | None]:
    """(the prompt, the tools that the model sees). A body of many bytes (`size`) is rendered in a thread."""
    template = model.template
    if template is None:
        raise InvalidRequest(f"{model.names[0]} has no chat template; use /v1/completions", param="messages")
    messages = template_messages(body.messages or [])
    tools = tools_in_force(body) if isinstance(body, ChatRequest) else template_tools(body.tools)
    extra = template_variables(body)
    begin_reply = body.add_generation_prompt is not False

    def render() -> str:
        return template.render(messages, tools=tools, add_generation_prompt=begin_reply, extra=extra)

    if size <= state.config.tokenize_inline_chars:
        return render(), tools
    return await asyncio.get_running_loop().run_in_executor(state.executor, render), tools

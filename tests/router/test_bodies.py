"""Bodies that are large or odd, to each API: a clear 4xx in its own shape, soon, and nothing is left behind."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from router_stack import Stack

SOON_S = 10.0  # on a busy machine; alone each takes a fraction of a second
PATHS = {"chat": "/v1/chat/completions", "responses": "/v1/responses", "messages": "/v1/messages"}
apis = pytest.mark.parametrize("api", list(PATHS))


def body_of(api: str, content: Any = "Hi", tools: list[Any] | None = None, **more: Any) -> dict[str, Any]:
    """A request with functions (name, schema)."""
    said = [{"role": "user", "content": content}]
    if api == "chat":
        functions = [{"type": "function", "function": {"name": n, "parameters": s}} for n, s in tools or ()]
        return {"messages": said, **({"tools": functions} if tools else {}), **more}
    if api == "responses":
        functions = [{"type": "function", "name": n, "parameters": s} for n, s in tools or ()]
        return {"input": said, **({"tools": functions} if tools else {}), **more}
    functions = [{"name": n, "input_schema": s} for n, s in tools or ()]
    return {"model": "mock", "max_tokens": 8, "messages": said, **({"tools": functions} if tools else {}), **more}


async def post(stack: Stack, api: str, raw: bytes) -> tuple[int, Any, float]:
    began_s = time.monotonic()
    async with stack.http.post(stack.url + PATHS[api], data=raw) as response:
        return response.status, await response.json(), time.monotonic() - began_s


async def refused(stack: Stack, api: str, body: Any, word: str) -> None:
    """A 400 in the API's shape that says what it is about; and the router goes on."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, reply, took_s = await post(stack, api, raw)
    assert (status, took_s < SOON_S) == (400, True), (reply, took_s)
    if api == "messages":
        assert reply["type"] == "error" and reply["request_id"] and set(reply["error"]) == {"type", "message"}
        assert reply["error"]["type"] == "invalid_request_error"
    else:
        assert set(reply) == {"error"} and set(reply["error"]) == {"message", "type", "param", "code"}
        assert reply["error"]["type"] == "invalid_request_error"
    assert word in json.dumps(reply["error"]), reply
    assert stack.worker.submits == []
    assert (await stack.chat())["choices"]


def large_schema(size: int) -> dict[str, Any]:
    """An object with as many described fields as make `size` bytes."""
    fields = {f"field_{n}": {"type": "string", "description": "d" * 60} for n in range(size // 110)}
    return {"type": "object", "properties": fields, "required": list(fields)[:5]}


@apis
async def test_a_tool_with_a_schema_of_a_megabyte(stack: Stack, api: str) -> None:
    """It is rendered and counted, and is more than the context holds."""
    body = body_of(api, tools=[("f", large_schema(1 << 20))])
    assert len(json.dumps(body)) > 900_000
    await refused(stack, api, body, "too long" if api == "messages" else "context_length_exceeded")


@apis
async def test_a_forced_call_with_a_schema_of_a_megabyte(stack: Stack, api: str) -> None:
    forced = {"type": "any"} if api == "messages" else "required"
    body = body_of(api, tools=[("f", large_schema(1 << 20))], tool_choice=forced)
    await refused(stack, api, body, "too long" if api == "messages" else "context_length_exceeded")


@apis
async def test_a_thousand_tools(stack: Stack, api: str) -> None:
    """Within the bound they are part of the prompt; beyond it they are refused by name."""
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}}
    body = body_of(api, tools=[(f"tool_{n}", schema) for n in range(1000)])
    await refused(stack, api, body, "too long" if api == "messages" else "context_length_exceeded")


@apis
async def test_too_many_tools(stack: Stack, api: str) -> None:
    schema = {"type": "object"}
    await refused(stack, api, body_of(api, tools=[(f"tool_{n}", schema) for n in range(1025)]), "tools")


@apis
@pytest.mark.parametrize("broken", ["\\ud800", "\\udc00 x", "x\\ud800\\ud800", "\\ud83d"])
async def test_unpaired_surrogates(stack: Stack, api: str, broken: str) -> None:
    raw = json.dumps(body_of(api, content="@@")).replace("@@", broken).encode()
    await refused(stack, api, raw, "JSON")


@apis
async def test_images(stack: Stack, api: str) -> None:
    picture = "data:image/png;base64,iVBORw0KGgo="
    content: list[dict[str, Any]] = {
        "chat": [{"type": "image_url", "image_url": {"url": picture}}],
        "responses": [{"type": "input_image", "image_url": picture}],
        "messages": [
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}
        ],
    }[api]
    await refused(stack, api, body_of(api, content=content), "image")


@apis
async def test_a_result_of_a_call_that_was_never_made(stack: Stack, api: str) -> None:
    body = body_of(api)
    if api == "chat":
        body["messages"].append({"role": "tool", "tool_call_id": "call_none", "content": "42"})
    elif api == "responses":
        body["input"].append({"type": "function_call_output", "call_id": "call_none", "output": "42"})
    else:
        body["messages"][0]["content"] = [{"type": "tool_result", "tool_use_id": "call_none", "content": "42"}]
    await refused(stack, api, body, "call_none")

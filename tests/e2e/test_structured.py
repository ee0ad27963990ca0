"""Structured output by the bundled model, through the official client."""

from __future__ import annotations

import json
from typing import Any

import httpx
import jsonschema
import pytest
from serving import Server

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "size": {"enum": ["small", "large"]},
        "people": {"type": "integer", "minimum": 0, "maximum": 999},
    },
    "required": ["city", "size", "people"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA, "strict": True}}
TOOL = {
    "type": "function",
    "function": {
        "name": "calculator",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string", "maxLength": 12}},
            "required": ["expression"],
            "additionalProperties": False,
        },
    },
}


def test_every_choice_has_the_form_whatever_the_temperature(bundled: Server) -> None:
    reply = bundled.chat("Tell me of a city.", n=6, temperature=2.0, seed=4, response_format=FORM, max_tokens=400)
    texts = [choice.message.content for choice in reply.choices if choice.finish_reason == "stop"]
    assert len(texts) >= 4
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_call_that_must_be_made(bundled: Server, stream: bool) -> None:
    parameters: dict[str, Any] = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    reply = bundled.chat("hello", stream=stream, **parameters)
    if stream:
        chunks = [chunk.choices[0] for chunk in reply if chunk.choices]
        text = "".join(part.function.arguments or "" for one in chunks for part in one.delta.tool_calls or [])
        finish = chunks[-1].finish_reason
    else:
        text, finish = reply.choices[0].message.tool_calls[0].function.arguments, reply.choices[0].finish_reason
    assert finish == "tool_calls"
    jsonschema.validate(json.loads(text), TOOL["function"]["parameters"])


def test_a_choice(bundled: Server) -> None:
    for seed in range(3):
        extra = {"structured_outputs": {"choice": ["left", "right"]}}
        reply = bundled.chat("hello", temperature=2.0, seed=seed, extra_body=extra)
        assert reply.choices[0].message.content in ("left", "right")


def test_the_next_request_is_free_again(bundled: Server) -> None:
    before = bundled.chat("hello").choices[0].message.content
    bundled.chat("hello", response_format=FORM)
    assert bundled.chat("hello").choices[0].message.content == before


def test_reasoning_has_a_budget(bundled: Server) -> None:
    """A bias makes the model begin to reason, and never end: its budget ends it, and what comes behind is an answer."""
    opened, closed = ids_of(bundled, "<think>"), ids_of(bundled, "</think>")
    for budget in (0, 5):
        extra = {"thinking_token_budget": budget, "logit_bias": {str(opened): 100}, "return_token_ids": True}
        choice = bundled.chat("hello", max_tokens=24, extra_body=extra).choices[0]
        ids = choice.model_dump()["token_ids"]
        assert ids[: budget + 2] == [opened] * (budget + 1) + [closed] and ids[budget + 2] != opened
        assert choice.message.content and len(ids) == 24
    ids = (
        bundled.chat("hello", extra_body={"thinking_token_budget": 5, "return_token_ids": True}).choices[0].model_dump()
    )
    assert ids["token_ids"] == free_ids(bundled), "who does not reason has no use for it"


def ids_of(server: Server, tag: str) -> int:
    """The token that a tag is."""
    asked = {"model": server.model, "prompt": tag, "add_special_tokens": False}
    (token_id,) = httpx.post(f"{server.url}/tokenize", json=asked, timeout=60).raise_for_status().json()["tokens"]
    return int(token_id)


def free_ids(server: Server) -> Any:
    return server.chat("hello", extra_body={"return_token_ids": True}).choices[0].model_dump()["token_ids"]

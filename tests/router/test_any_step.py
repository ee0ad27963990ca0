"""However a worker's steps cut an answer, each API's stream adds up to the reply that is no stream."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from mock_worker import Script
from router_stack import Stack

from tokenrelay.proto import worker_pb2

READ = {"type": "object", "properties": {"path": {"type": "string"}}}
ANSWER = (
    "<think>\nGröße 東京 👋🏽, well < / > think\n</think>\n\nI look. <tool_cal no, "
    '<tool_call>\n{"name": "read", "arguments": {"path": "a \\"b\\" ü"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "read", "arguments": {"path": "<b>", "more": [1, {"x": null}]}}\n</tool_call>'
)
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "Hi"}],
        "tools": [{"type": "function", "function": {"name": "read", "parameters": READ}}],
    },
    "/v1/responses": {"input": "Hi", "tools": [{"type": "function", "name": "read", "parameters": READ}]},
    "/v1/messages": {
        "model": "mock",
        "max_tokens": 2000,
        "messages": [{"role": "user", "content": "Hi"}],
        "tools": [{"name": "read", "input_schema": READ}],
    },
}
Said = tuple[str, str, list[tuple[str, Any]]]  # reasoning, text, calls


def whole(path: str, reply: Any) -> Said:
    if path == "/v1/chat/completions":
        message = reply["choices"][0]["message"]
        calls = [(one["function"]["name"], json.loads(one["function"]["arguments"])) for one in message["tool_calls"]]
        return message["reasoning_content"], message["content"], calls
    if path == "/v1/messages":
        blocks = reply["content"]
        calls = [(one["name"], one["input"]) for one in blocks if one["type"] == "tool_use"]
        texts = ["".join(one.get(kind, "") for one in blocks if one["type"] == kind) for kind in ("thinking", "text")]
        return texts[0], texts[1], calls
    items = reply["output"]
    calls = [(one["name"], json.loads(one["arguments"])) for one in items if one["type"] == "function_call"]
    texts = [
        "".join(part["text"] for one in items if one["type"] == kind for part in one["content"])
        for kind in ("reasoning", "message")
    ]
    return texts[0], texts[1], calls


def streamed(path: str, raw: bytes) -> Said:
    """Added up as clients do, delta by delta."""
    reasoning, text, names, arguments = "", "", {}, {}
    for line in raw.decode().splitlines():
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line[6:])
        kind = event.get("type", "")
        if path == "/v1/chat/completions":
            delta = event["choices"][0]["delta"] if event["choices"] else {}
            reasoning += delta.get("reasoning_content") or ""
            text += delta.get("content") or ""
            for call in delta.get("tool_calls") or ():
                function = call.get("function") or {}
                names[call["index"]] = names.get(call["index"], "") + (function.get("name") or "")
                arguments[call["index"]] = arguments.get(call["index"], "") + (function.get("arguments") or "")
        elif kind == "content_block_start" and event["content_block"]["type"] == "tool_use":
            names[event["index"]] = event["content_block"]["name"]
        elif kind == "content_block_delta":
            delta = event["delta"]
            reasoning += delta.get("thinking", "")
            text += delta.get("text", "")
            if "partial_json" in delta:
                arguments[event["index"]] = arguments.get(event["index"], "") + delta["partial_json"]
        elif kind == "response.output_item.added" and event["item"]["type"] == "function_call":
            names[event["output_index"]] = event["item"]["name"]
        elif kind == "response.function_call_arguments.delta":
            arguments[event["output_index"]] = arguments.get(event["output_index"], "") + event["delta"]
        elif kind == "response.output_text.delta":
            text += event["delta"]
        elif kind == "response.reasoning_text.delta":
            reasoning += event["delta"]
    return reasoning, text, [(names[index], json.loads(arguments[index])) for index in sorted(names)]


@pytest.mark.parametrize("path", list(BODIES))
async def test_a_stream_adds_up(stack: Stack, path: str) -> None:
    ids = [*stack.worker.ids(ANSWER), stack.worker.eos]
    stack.worker.say(ANSWER, per_step=1000)
    status, reply = await stack.post(path, BODIES[path])
    assert status == 200, reply
    expected = whole(path, reply)
    assert len(expected[2]) == 2 and "東京 👋🏽" in expected[0] and "<tool_cal no" in expected[1]
    rng = random.Random(7)
    for per_step in (1, 2, 3, 5, 8, 13, 40, *(rng.randint(1, len(ids)) for _ in range(8))):
        script = Script(ids, finish=worker_pb2.FINISH_STOP, per_step=per_step)
        stack.worker.host.answer = lambda submit, script=script: script
        async with stack.http.post(stack.url + path, json={**BODIES[path], "stream": True}) as response:
            raw = await response.read()
        assert streamed(path, raw) == expected, f"{per_step} tokens a step"

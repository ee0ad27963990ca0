"""Whatever is sent: an answer, in OpenAI's shape, never a 500 and never a hang."""

from __future__ import annotations

import json
from typing import Any

from fuzzed import Fuzzed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mock_worker import TAGS

from tokenrelay.services.router.openai_types import ChatRequest, CompletionRequest

PATHS = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")
FIELDS = sorted({*ChatRequest.__struct_fields__, *CompletionRequest.__struct_fields__})

TEXT = st.one_of(
    st.text(max_size=8), st.sampled_from([*TAGS, "<|im_start|>", "user", "\ufffd", "\x00", "auto", "none"])
)
NUMBER = st.one_of(
    st.integers(-3, 30),
    st.integers(),
    st.floats(allow_nan=True),
    st.sampled_from([0.5, 1e308, 10**30, -(2**63), 2**64 - 1]),
)
SCALAR = st.one_of(st.none(), st.booleans(), NUMBER, TEXT)
ANY = st.recursive(
    SCALAR,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=8,
)
CALL = st.fixed_dictionaries(
    {"function": st.fixed_dictionaries({"name": TEXT, "arguments": st.one_of(TEXT, st.just('{"a": 1}'), ANY)})},
    optional={"id": TEXT, "type": TEXT},
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool", "wizard"])},
    optional={
        "content": st.one_of(
            TEXT, st.none(), st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": TEXT}), max_size=2), ANY
        ),
        "tool_calls": st.lists(CALL, max_size=2),
        "reasoning_content": TEXT,
        "name": TEXT,
        "tool_call_id": TEXT,
    },
)
TOOL = st.fixed_dictionaries(
    {
        "type": st.just("function"),
        "function": st.fixed_dictionaries({"name": TEXT}, optional={"parameters": ANY, "description": ANY}),
    }
)
SENSIBLE: dict[str, st.SearchStrategy[Any]] = {
    "messages": st.lists(MESSAGE, max_size=4),
    "prompt": st.one_of(TEXT, st.lists(st.integers(0, 700), max_size=5), st.lists(TEXT, max_size=3)),
    "tokens": st.lists(st.integers(0, 700), max_size=5),
    "n": st.integers(1, 4),
    "max_tokens": st.integers(1, 50),
    "temperature": st.floats(0, 2),
    "stop": st.one_of(TEXT, st.lists(TEXT, max_size=4)),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "logprobs": st.one_of(st.booleans(), st.integers(0, 5)),
    "top_logprobs": st.integers(0, 5),
    "tools": st.lists(TOOL, max_size=2),
    "tool_choice": st.sampled_from(["auto", "none"]),
    "stop_token_ids": st.lists(st.integers(0, 500), max_size=3),
    "return_token_ids": st.booleans(),
    "parallel_tool_calls": st.booleans(),
    "chat_template_kwargs": st.dictionaries(st.text(max_size=5), ANY, max_size=2),
}


@st.composite
def bodies(draw: st.DrawFn) -> dict[str, Any]:
    """Mostly sensible, with a field or two that are anything."""
    body = {name: draw(SENSIBLE[name]) for name in draw(st.sets(st.sampled_from(sorted(SENSIBLE)), max_size=8))}
    body |= {name: draw(ANY) for name in draw(st.sets(st.sampled_from(FIELDS), max_size=2))}
    if draw(st.booleans()):
        body.setdefault("messages", [{"role": "user", "content": "Hi"}])
        body.setdefault("prompt", "Hi")
    return body


def check(status: int, reply: bytes) -> None:
    assert status == 200 or 400 <= status < 500, (status, reply[:500])
    if status >= 400:
        error = json.loads(reply)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(path=st.sampled_from(PATHS), body=bodies())
def test_any_fields(fuzzed: Fuzzed, path: str, body: dict[str, Any]) -> None:
    status, reply = fuzzed.send(path, json.dumps(body).encode())
    check(status, reply)
    if status == 200 and body.get("stream") is True and path.startswith("/v1"):
        assert reply.count(b"data: [DONE]") == 1
        assert b'"error"' not in reply


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(PATHS),
    body=st.one_of(st.binary(max_size=40), ANY.map(lambda value: json.dumps(value).encode())),
)
def test_any_bytes(fuzzed: Fuzzed, path: str, body: bytes) -> None:
    check(*fuzzed.send(path, body))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=bodies(), data=st.data())
def test_a_good_body_with_bytes_broken(fuzzed: Fuzzed, body: dict[str, Any], data: st.DataObject) -> None:
    encoded = bytearray(json.dumps(body, ensure_ascii=False).encode("utf-8", "replace"))
    for _ in range(data.draw(st.integers(1, 3))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    check(*fuzzed.send("/v1/chat/completions", bytes(encoded)))

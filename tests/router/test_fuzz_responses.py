"""Whatever is sent to OpenAI's Responses: an answer, in OpenAI's shape, never a 500 and never a hang."""

from __future__ import annotations

import json
from typing import Any

from fuzzed import Fuzzed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenrelay.services.router.responses_types import ResponsesRequest

PATH = "/v1/responses"
TEXT = st.one_of(st.text(max_size=8), st.sampled_from(["<tool_call>", "\x00", "user", "auto", "tr1:", "tr1:YQ=="]))
SCALAR = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=True), TEXT)
ANY = st.recursive(
    SCALAR,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
IDS = st.sampled_from(["a", "b"])
PARTS = st.lists(
    st.one_of(st.fixed_dictionaries({"type": st.sampled_from(["input_text", "output_text"]), "text": TEXT}), ANY),
    max_size=2,
)
ITEM = st.one_of(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "developer"]), "content": st.one_of(TEXT, PARTS)}
    ),
    st.fixed_dictionaries({"type": st.just("function_call"), "call_id": IDS, "name": TEXT, "arguments": TEXT}),
    st.fixed_dictionaries({"type": st.just("function_call_output"), "call_id": IDS, "output": st.one_of(TEXT, PARTS)}),
    st.fixed_dictionaries({"type": st.just("reasoning")}, optional={"encrypted_content": TEXT, "summary": PARTS}),
    ANY,
)
SENSIBLE: dict[str, st.SearchStrategy[Any]] = {
    "input": st.one_of(TEXT, st.lists(ITEM, max_size=4)),
    "instructions": TEXT,
    "stream": st.booleans(),
    "temperature": st.floats(0, 2),
    "max_output_tokens": st.integers(1, 40),
    "include": st.lists(st.sampled_from(["reasoning.encrypted_content"]), max_size=1),
    "tools": st.lists(
        st.fixed_dictionaries({"type": st.just("function"), "name": TEXT}, optional={"parameters": ANY}), max_size=2
    ),
    "tool_choice": st.sampled_from(["auto", "none"]),
}


@st.composite
def bodies(draw: st.DrawFn) -> dict[str, Any]:
    """Mostly sensible, with a field or two that are anything."""
    body: dict[str, Any] = {"input": "Hi"}
    body |= {name: draw(SENSIBLE[name]) for name in draw(st.sets(st.sampled_from(sorted(SENSIBLE)), max_size=5))}
    return body | {
        name: draw(ANY) for name in draw(st.sets(st.sampled_from(ResponsesRequest.__struct_fields__), max_size=1))
    }


def check(status: int, reply: bytes) -> None:
    assert status == 200 or 400 <= status < 500, (status, reply[:500])
    if status >= 400:
        error = json.loads(reply)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"


@settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(body=bodies())
def test_any_fields(fuzzed: Fuzzed, body: dict[str, Any]) -> None:
    status, reply = fuzzed.send(PATH, json.dumps(body).encode())
    check(status, reply)
    if status == 200 and body.get("stream") is True:
        assert reply.count(b"event: response.completed") + reply.count(b"event: response.incomplete") == 1
        assert b"event: response.failed" not in reply


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.one_of(st.binary(max_size=40), ANY.map(lambda value: json.dumps(value).encode())))
def test_any_bytes(fuzzed: Fuzzed, body: bytes) -> None:
    check(*fuzzed.send(PATH, body))

"""Whatever is sent to Anthropic's Messages: an answer, in Anthropic's shape, never a 500 and never a hang."""

from __future__ import annotations

import json
from typing import Any

from fuzzed import Fuzzed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenrelay.services.router.messages_types import MessagesRequest

PATHS = ("/v1/messages", "/v1/messages/count_tokens")
TEXT = st.one_of(st.text(max_size=8), st.sampled_from(["<tool_call>", "\x00", "user", "auto"]))
SCALAR = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=True), TEXT)
ANY = st.recursive(
    SCALAR,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
IDS = st.sampled_from(["a", "b"])
BLOCK = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": TEXT}),
    st.fixed_dictionaries({"type": st.just("thinking"), "thinking": TEXT}, optional={"signature": TEXT}),
    st.fixed_dictionaries(
        {"type": st.just("tool_use"), "id": IDS, "name": TEXT, "input": st.dictionaries(TEXT, ANY, max_size=2)}
    ),
    st.fixed_dictionaries({"type": st.just("tool_result"), "tool_use_id": IDS}, optional={"content": TEXT}),
    st.fixed_dictionaries(
        {"type": st.sampled_from(["image", "document", "redacted_thinking"])}, optional={"source": ANY}
    ),
    ANY,
)
MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "user", "system"]),
        "content": st.one_of(TEXT, st.lists(BLOCK, max_size=3)),
    }
)
SENSIBLE: dict[str, st.SearchStrategy[Any]] = {
    "system": st.one_of(TEXT, st.lists(BLOCK, max_size=2)),
    "messages": st.lists(MESSAGE, min_size=1, max_size=4),
    "stream": st.booleans(),
    "temperature": st.floats(0, 1),
    "stop_sequences": st.lists(TEXT, max_size=2),
    "tools": st.lists(
        st.fixed_dictionaries(
            {"name": TEXT, "input_schema": st.one_of(st.just({"type": "object"}), ANY)}, optional={"type": TEXT}
        ),
        max_size=2,
    ),
    "tool_choice": st.fixed_dictionaries({"type": st.sampled_from(["auto", "none", "any", "tool"])}),
    "thinking": st.fixed_dictionaries({"type": st.sampled_from(["enabled", "disabled", "adaptive"])}),
}


@st.composite
def bodies(draw: st.DrawFn) -> dict[str, Any]:
    """Mostly sensible, with a field or two that are anything."""
    body: dict[str, Any] = {"model": "mock", "max_tokens": 20, "messages": [{"role": "user", "content": "Hi"}]}
    body |= {name: draw(SENSIBLE[name]) for name in draw(st.sets(st.sampled_from(sorted(SENSIBLE)), max_size=5))}
    return body | {
        name: draw(ANY) for name in draw(st.sets(st.sampled_from(MessagesRequest.__struct_fields__), max_size=1))
    }


def check(status: int, reply: bytes) -> None:
    assert status == 200 or 400 <= status < 500, (status, reply[:500])
    if status >= 400:
        error = json.loads(reply)
        assert set(error) == {"type", "error", "request_id"}
        assert error["error"]["type"] in ("invalid_request_error", "not_found_error")


@settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(path=st.sampled_from(PATHS), body=bodies())
def test_any_fields(fuzzed: Fuzzed, path: str, body: dict[str, Any]) -> None:
    status, reply = fuzzed.send(path, json.dumps(body).encode())
    check(status, reply)
    if status == 200 and body.get("stream") is True and path == PATHS[0]:
        assert reply.count(b"event: message_stop") == 1
        assert b"event: error" not in reply


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(PATHS),
    body=st.one_of(st.binary(max_size=40), ANY.map(lambda value: json.dumps(value).encode())),
)
def test_any_bytes(fuzzed: Fuzzed, path: str, body: bytes) -> None:
    check(*fuzzed.send(path, body))

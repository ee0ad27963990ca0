"""Tool calls out of text, however it is cut."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenrelay.services.router.text import ChatText, Delta, whole_calls
from tokenrelay.services.router.tool_parsers import HermesParser
from tokenrelay.services.router.tools import CallArguments, CallBroken, CallEnd, CallStart, Event, Text

CALL = '<tool_call>\n{"name": "read", "arguments": {"path": "a"}}\n</tool_call>'


def fed(pieces: list[str]) -> list[Event]:
    parser = HermesParser()
    return [event for piece in pieces for event in parser.feed(piece)] + parser.finish()


def folded(events: list[Event]) -> tuple[str, list[tuple[str, str]]]:
    """(text, calls) as a unary reply has them."""
    text = "".join(event.text for event in events if isinstance(event, Text | CallBroken))
    return text, [(name, arguments) for _, name, arguments in whole_calls(events)]


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("Just text.", "Just text.", []),
        (CALL, "", [("read", '{"path": "a"}')]),
        (f"Let me see.\n{CALL}", "Let me see.", [("read", '{"path": "a"}')]),
        (f"{CALL}\n{CALL}", "", [("read", '{"path": "a"}')] * 2),
        (f"{CALL} done", "done", [("read", '{"path": "a"}')]),
        ('<tool_call>{"arguments": {"a": 1}, "name": "x"}</tool_call>', "", [("x", '{"a":1}')]),
        ('<tool_call>{"name": "x"}</tool_call>', "", [("x", "{}")]),
        ('<tool_call>{"name": "x", "parameters": {"a": [1, {}]}}</tool_call>', "", [("x", '{"a": [1, {}]}')]),
        ('<tool_call>{"name": "x", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("x", '{"a":1}')]),
        ('<tool_call>{"name": "x", "arguments": {"s": "}\\" </tool_call> {"}}</tool_call>', "",
         [("x", '{"s": "}\\" </tool_call> {"}')]),
        ('<tool_call>{"name": "x", "arguments": {"s": "\\\\"}}</tool_call>', "", [("x", '{"s": "\\\\"}')]),
        ('<tool_call>{"name": "x", "arguments": {"a": 1}}', "", [("x", '{"a": 1}')]),  # only the close tag lacks
        ("<tool_call>not json</tool_call>", "<tool_call>not json</tool_call>", []),
        ('<tool_call>{"name": 1, "arguments": {}}</tool_call>',
         '<tool_call>{"name": 1, "arguments": {}}</tool_call>', []),
        ('<tool_call>{"name": "x", "arguments": [1]}</tool_call>',
         '<tool_call>{"name": "x", "arguments": [1]}</tool_call>', []),
        ('<tool_call>{"name": "x", "arguments": {"a": 1}</tool_call> and',
         '<tool_call>{"name": "x", "arguments": {"a": 1}</tool_call> and', []),
        ('<tool_call>{"name": "x", "arguments": {"a": </tool_call>!',
         '<tool_call>{"name": "x", "arguments": {"a": </tool_call>!', []),
        ('<tool_call>{"name": "x", "arguments": {"a": "cut', '<tool_call>{"name": "x", "arguments": {"a": "cut', []),
        ("a < b <tool", "a < b <tool", []),
        ("<tool_call>", "<tool_call>", []),
    ],
)  # fmt: skip
def test_transcripts(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    for size in (1, 2, 3, 7, 1000):
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        assert folded(fed(pieces)) == (content, calls), f"in pieces of {size}"


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(10**9), 10**9), st.text(max_size=12)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(
    calls=st.lists(
        st.tuples(st.text(min_size=1, max_size=10), st.dictionaries(st.text(max_size=6), VALUES, max_size=3)),
        max_size=3,
    ),
    data=st.data(),
    ascii_only=st.booleans(),
)
def test_what_was_called_comes_out(
    calls: list[tuple[str, dict[str, object]]], data: st.DataObject, ascii_only: bool
) -> None:
    text = "".join(
        f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=ascii_only)}\n</tool_call>\n"
        for name, arguments in calls
    )
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    content, found = folded(fed(pieces))
    assert content == ""
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


@settings(max_examples=200, deadline=None)
@given(
    pieces=st.lists(
        st.one_of(
            st.sampled_from(
                ["<tool_call>", "</tool_call>", '{"name": "x", "arguments": {', "}", '"', "\\", "<", "\n", CALL]
            ),
            st.text(max_size=4),
        ),
        max_size=12,
    )
)
def test_any_text_comes_out_the_same_however_it_is_cut(pieces: list[str]) -> None:
    assert folded(fed(pieces)) == folded(fed(["".join(pieces)])) == folded(fed(list("".join(pieces))))


def test_arguments_stream_as_they_come() -> None:
    parser = HermesParser()
    first = parser.feed('<tool_call>\n{"name": "read", "arguments": {"pa')
    assert [type(event) for event in first] == [CallStart, CallArguments]
    assert first[1] == CallArguments(0, '{"pa')
    assert parser.feed('th": "a') == [CallArguments(0, 'th": "a')]
    assert parser.feed('"}}\n</tool_call>') == [CallArguments(0, '"}'), CallEnd(0)]


def test_a_call_that_breaks_after_it_began_to_stream_is_no_tool_call() -> None:
    text = ChatText(tools=HermesParser())
    delta = Delta()
    text.feed('<tool_call>{"name": "x", "arguments": {"a": 1} oops</tool_call>', delta)
    text.finish(delta)
    assert delta.content == '<tool_call>{"name": "x", "arguments": {"a": 1} oops</tool_call>'
    assert whole_calls(delta.events) == []
    assert text.finish_reason("stop") == "stop"


def test_only_one_call_when_calls_may_not_be_parallel() -> None:
    text = ChatText(tools=HermesParser(), calls_max=1)
    delta = Delta()
    text.feed(CALL + CALL, delta)
    assert text.ended
    assert len(whole_calls(delta.events)) == 1
    assert text.finish_reason("stop") == "tool_calls"
    assert text.finish_reason("length") == "length"

"""The exam's grading: what counts as a call, as the right one, as an answer."""

from __future__ import annotations

from typing import Any

import pytest

from tokenrelay.assets.training.grading import Tally, parse

CALL = '<tool_call>\n{"name": "get_time", "arguments": {"city": "%s"}}\n</tool_call>'


def wanted(*cities: str) -> dict[str, Any]:
    calls = [{"function": {"name": "get_time", "arguments": {"city": city}}} for city in cities]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def graded(text: str, message: dict[str, Any], closed: bool = True, facts: tuple[str, ...] = ()) -> Tally:
    tally = Tally()
    tally.grade(parse(text, closed), message, facts)
    return tally


def test_reasoning_calls_and_content_come_apart() -> None:
    reply = parse(f"<think>\nTwo.\n</think>\n\n{CALL % 'Rome'}\n{CALL % 'Oslo'}")
    assert reply.reasoning == "Two."
    assert reply.content == ""
    assert reply.calls == (("get_time", '{"city": "Rome"}'), ("get_time", '{"city": "Oslo"}'))


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\n{\n</tool_call>",
        '<tool_call>\n{"name": 3, "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "x", "arguments": "{}"}\n</tool_call>',
        '<tool_call>\n{"name": "x", "arguments": {}}',
        "<tool_call>\n[]\n</tool_call>",
    ],
)
def test_a_malformed_call_is_none(text: str) -> None:
    assert parse(text).calls == (None,)
    assert graded(text, wanted("Rome")).well_formed == 0


@pytest.mark.parametrize(
    ("text", "message", "figures"),
    [
        (CALL % "Rome", wanted("Rome"), (1, 1, 1, 1)),
        (CALL % "Oslo", wanted("Rome"), (1, 1, 1, 0)),
        (CALL % "Oslo" + CALL % "Rome", wanted("Rome", "Oslo"), (2, 2, 2, 2)),
        (CALL % "Rome", wanted("Rome", "Oslo"), (2, 1, 1, 1)),
        (CALL % "Rome" + CALL % "Rome", wanted("Rome"), (2, 2, 1, 1)),
        ("I can not.", wanted("Rome"), (1, 0, 0, 0)),
        (CALL % "Rome", {"role": "assistant", "content": "Hi"}, (1, 1, 0, 0)),
    ],
)
def test_calls_are_counted(text: str, message: dict[str, Any], figures: tuple[int, ...]) -> None:
    tally = graded(text, message)
    assert (tally.calls, tally.well_formed, tally.right_tool, tally.right_arguments) == figures


def test_a_turn_that_never_ends_is_wrong() -> None:
    assert graded(CALL % "Rome", wanted("Rome"), closed=False).right_arguments == 0
    assert graded("Rome", {"role": "assistant", "content": "Rome"}, closed=False, facts=("Rome",)).right_answers == 0


def test_an_answer_needs_all_its_facts_and_no_call() -> None:
    message = {"role": "assistant", "content": "In Rome it is 10:30."}
    assert graded("10:30 in Rome", message, facts=("Rome", "10:30")).right_answers == 1
    assert graded("10:31 in Rome", message, facts=("Rome", "10:30")).right_answers == 0
    assert graded("10:30 in Rome" + CALL % "Rome", message, facts=("Rome", "10:30")).right_answers == 0

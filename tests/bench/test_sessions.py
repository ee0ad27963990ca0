"""bench/sessions.py: its sessions, how it plays them, what it counts."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "bench/sessions.py"
spec = importlib.util.spec_from_file_location("bench_sessions", SCRIPT)
assert spec and spec.loader
sessions: Any = importlib.util.module_from_spec(spec)
sys.modules["bench_sessions"] = sessions
spec.loader.exec_module(sessions)


class Oracle:
    """Says what a session wants, turn by turn; from turn `wrong_from` on something else."""

    def __init__(self, session: Any, wrong_from: int = 99, calls_for_ever: bool = False) -> None:
        self.turns = session.turns
        self.turn = -1
        self.wrong_from = wrong_from
        self.calls_for_ever = calls_for_ever
        self.given: list[tuple[str, str]] = []

    def user(self, text: str) -> None:
        self.turn += 1
        assert text == self.turns[self.turn].text
        self.given = []

    def results(self, given: list[tuple[str, str]]) -> None:
        self.given = given

    async def say(self, *_: Any) -> Any:
        turn = self.turns[self.turn]
        if self.calls_for_ever or (turn.results and not self.given):
            calls = [(f"c{n}", name, json.loads(args)) for n, (name, args) in enumerate(turn.results)]
            return sessions.Said(calls or [("c", "nothing", {})], "")
        if self.given:
            assert [text for _, text in self.given] == list(turn.results.values())
        return sessions.Said([], "nonsense" if self.turn >= self.wrong_from else "; ".join(turn.facts))


def played(session: Any, oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    monkeypatch.setattr(sessions, "_say", oracle.say)
    right: list[bool] = asyncio.run(sessions.play(None, "", "", session, oracle))
    return right


def test_sessions_have_their_length_and_are_the_same_each_time() -> None:
    for seed in range(20):
        session = sessions.generate(seed, 10)
        assert len(session.turns) == 10 and session == sessions.generate(seed, 10)
        assert session != sessions.generate(seed + 1, 10) and session.tools
        assert sum(bool(turn.facts) for turn in session.turns) >= 9, "a joke may be any"
        offered = {tool["function"]["name"] for tool in session.tools}
        assert {name for turn in session.turns for name, _ in turn.results} <= offered
    assert any(turn.results for turn in session.turns)


def test_playing_gives_each_call_its_result(monkeypatch: pytest.MonkeyPatch) -> None:
    session = sessions.generate(3, 5)
    assert played(session, Oracle(session), monkeypatch) == [True] * 5
    assert played(session, Oracle(session, wrong_from=4), monkeypatch) == [True] * 4 + [False]
    assert played(session, Oracle(session, calls_for_ever=True), monkeypatch) == [False] * 5


def test_an_ending_counts_by_its_last_answer() -> None:
    session = sessions.generate(3, 5)
    found = sessions.figures("chat", 5, [(session, [False, True, True, True, True]), (session, [True] * 4 + [False])])
    assert (found["ended_right"], found["all_right"], found["turns_right"], found["wanted"]) == (0.5, 0.0, 0.8, 0.9)
    assert sum(found["wrong_by_skill"].values()) == 2


def test_each_api_keeps_its_conversation() -> None:
    session = sessions.generate(3, 5)
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    chat, messages, responses = (sessions.APIS[name](session) for name in ("chat", "messages", "responses"))
    for api in (chat, messages, responses):
        api.user("Hi")
    chat_reply = {"choices": [{"message": {"role": "assistant", "content": None, "tool_calls": [call]}}]}
    block = {"type": "tool_use", "id": "c1", "name": "f", "input": {"x": 1}}
    item = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"x": 1}'}
    wanted = sessions.Said([("c1", "f", {"x": 1})], "")
    assert chat.take(chat_reply) == wanted
    assert messages.take({"content": [block]}) == wanted
    assert responses.take({"id": "r1", "output": [item]}) == wanted
    for api in (chat, messages, responses):
        api.results([("c1", "one")])
    assert [message["role"] for message in chat.body()["messages"]] == ["system", "user", "assistant", "tool"]
    assert "content" not in chat.messages[2], "null is not sent back"
    assert messages.body()["messages"][-1]["content"][0]["tool_use_id"] == "c1"
    assert responses.body()["previous_response_id"] == "r1" and responses.body()["input"][0]["call_id"] == "c1"
    bad = {**call, "function": {"name": "f", "arguments": "{"}}
    said = chat.take({"choices": [{"message": {"role": "assistant", "content": "x", "tool_calls": [bad]}}]})
    assert said == sessions.Said([("c1", "f", "{")], "x"), "what is no JSON matches no call"

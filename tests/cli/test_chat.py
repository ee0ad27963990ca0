"""The terminal chat against a scripted server: piped, and on a pseudo-terminal with real keys."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from terminal import Terminal

from tokenrelay.base.errors import ConfigError, Unavailable
from tokenrelay.cli.chat import Answer, clean, figures, read_tools
from tokenrelay.cli.client import ApiClient, ApiError, join_tool_calls

COMMAND = [sys.executable, "-m", "tokenrelay.cli.main", "chat"]
USAGE = {"prompt_tokens": 80, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 64}}


def piped(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], input=stdin, capture_output=True, text=True, timeout=30)


@pytest.fixture
def terminal(scripted: Any) -> Iterator[Terminal]:
    running = Terminal([*COMMAND, "--url", scripted.url])
    yield running
    running.close()


def test_piped_text_is_one_message_and_the_answer_alone_comes_out(scripted: Any) -> None:
    scripted.say({"reasoning_content": "let me see"}, "Grüße", " — 日本\n", usage=USAGE)
    done = piped(
        "--url",
        scripted.url,
        "--seed",
        "7",
        "--temperature",
        "0",
        "--max-tokens",
        "9",
        "-s",
        "Be brief.",
        stdin="a\nb\n",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "Grüße — 日本\n", "")
    assert scripted.requests == [
        {
            "model": "scripted",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a\nb"}],
            "temperature": 0.0,
            "seed": 7,
            "max_completion_tokens": 9,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


def test_a_message_on_the_command_line(scripted: Any) -> None:
    scripted.say("yes")
    done = piped("well?", "--url", scripted.url + "/v1/", "--api-key", "k", stdin="not read")
    assert (done.returncode, done.stdout) == (0, "yes\n")
    assert scripted.authorizations == ["Bearer k"]


def test_tool_calls_are_printed_when_piped(scripted: Any, tmp_path: Path) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps([{"name": "calculator", "parameters": {}}]))
    scripted.say(
        {"tool_calls": [{"index": 0, "id": "c1", "function": {"name": "calculator", "arguments": '{"expr'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": 'ession": "1+1"}'}}]},
        finish="tool_calls",
    )
    done = piped("1+1?", "--url", scripted.url, "--tools", str(tools))
    assert (done.returncode, done.stdout) == (0, 'calculator({"expression": "1+1"})\n')
    assert scripted.requests[0]["tools"] == [{"type": "function", "function": {"name": "calculator", "parameters": {}}}]


@pytest.mark.parametrize(
    ("arguments", "stdin", "sentence"),
    [
        (
            ["--url", "http://127.0.0.1:9"],
            "x",
            "no server answers at http://127.0.0.1:9 (Connection refused); start one with: tokenrelay serve",
        ),
        (["--url", "ftp://x"], "x", "--url 'ftp://x' is not an http address such as http://127.0.0.1:8000"),
        (
            ["--tools", "/no/such.json", "--url", "x"],
            "x",
            "cannot read the tools file /no/such.json: No such file or directory",
        ),
    ],
)
def test_errors_are_one_sentence(arguments: list[str], stdin: str, sentence: str) -> None:
    done = piped(*arguments, stdin=stdin)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"tokenrelay: {sentence}\n")


def test_no_message_is_an_error(scripted: Any) -> None:
    done = piped("--url", scripted.url, stdin=" \n")
    assert done.returncode == 1
    assert "there is no message" in done.stderr


def test_a_refusal_shows_the_servers_own_words(scripted: Any) -> None:
    scripted.refuse(429, {"error": {"message": "the queue is full", "type": "overloaded", "param": None, "code": "x"}})
    done = piped("hi", "--url", scripted.url)
    assert (done.returncode, done.stderr) == (1, "tokenrelay: the queue is full\n")


def test_terminal_conversation(scripted: Any, terminal: Terminal) -> None:
    terminal.until(r"scripted at http.*› ")
    scripted.say({"reasoning_content": "hmm"}, "Hello", " there", usage=USAGE)
    terminal.type("hi\r")
    shown = terminal.until(r"64 of 80 prompt tokens from the cache.*› ")
    assert re.search("\x1b\\[2;3mhmm\x1b\\[0m\r\nHello there\r\n", shown), shown
    scripted.say("Again")
    terminal.type("and\\\rmore\r")
    terminal.until(r"Again.*› ")
    assert scripted.requests[1]["messages"] == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Hello there"},
        {"role": "user", "content": "and\nmore"},
    ]
    terminal.type("/system Be a cat.\r")
    terminal.until("new conversation with this system message.*› ")
    scripted.say("Meow")
    terminal.type("who?\r")
    terminal.until("Meow.*› ")
    assert scripted.requests[2]["messages"] == [
        {"role": "system", "content": "Be a cat."},
        {"role": "user", "content": "who?"},
    ]
    terminal.type("/help\r")
    terminal.until("forget the conversation.*› ")
    terminal.type("/what\r")
    terminal.until("no command /what.*› ")
    terminal.type("/quit\r")
    assert terminal.end() == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(scripted: Any, slow: Any, terminal: Terminal) -> None:
    terminal.until("› ")
    scripted.say("Once upon", slow)
    terminal.type("a story\r")
    terminal.until(r"Once upon\.\.")
    terminal.type("\x03")
    terminal.until(r"\(stopped\).*› ")
    assert scripted.disconnected.wait(5), "the server is not told"
    terminal.type("\x03")
    terminal.until("Ctrl-D leaves")
    scripted.say("Sure")
    terminal.type("go on\r")
    terminal.until("Sure.*› ")
    roles = [message["role"] for message in scripted.requests[1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert scripted.requests[1]["messages"][1]["content"].startswith("Once upon..")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_a_tool_round_on_the_terminal(scripted: Any, terminal: Terminal) -> None:
    terminal.until("› ")
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "calculator", "arguments": '{"e":"6*7"}'}}
    scripted.say({"tool_calls": [call]}, finish="tool_calls")
    scripted.say("It is 42.")
    terminal.type("6*7?\r")
    terminal.until(r'→ calculator\(\{"e":"6\*7"\}\).*result of calculator.*= ')
    terminal.type("42\r")
    terminal.until(r"It is 42\..*› ")
    assert scripted.requests[1]["messages"][1:] == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "calculator", "arguments": '{"e":"6*7"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
    ]
    terminal.type("/quit\r")
    assert terminal.end() == 0


def test_a_failed_turn_leaves_no_trace(scripted: Any, terminal: Terminal) -> None:
    terminal.until("› ")
    scripted.refuse(400, {"error": {"message": "messages is too long", "param": "messages"}})
    terminal.type("hi\r")
    terminal.until("error: messages is too long.*› ")
    scripted.say("half", cut=True)
    terminal.type("hi\r")
    terminal.until("error: the server closed the stream before its end.*› ")
    scripted.say("whole")
    terminal.type("ho\r")
    terminal.until("whole.*› ")
    assert scripted.requests[2]["messages"] == [{"role": "user", "content": "ho"}]
    terminal.type("\x04")
    assert terminal.end() == 0


def test_errors_in_mid_stream_are_raised(scripted: Any) -> None:
    client = ApiClient(scripted.url)
    scripted.say("a", {"content": "b"})
    assert "".join(delta.content for delta in client.stream_chat({"messages": []})) == "ab"
    scripted.refuse(502, b"<html>bad gateway</html>")
    with pytest.raises(ApiError, match="answered 502"):
        list(client.stream_chat({"messages": []}))
    scripted.say("a", cut=True)
    with pytest.raises(Unavailable, match="before its end"):
        list(client.stream_chat({"messages": []}))


def test_partial_tool_calls_are_joined_by_index() -> None:
    calls: list[dict[str, Any]] = []
    join_tool_calls(calls, [{"index": 1, "id": "b", "function": {"name": "two", "arguments": ""}}])
    join_tool_calls(calls, [{"index": 0, "id": "a", "function": {"name": "one", "arguments": "{"}}])
    join_tool_calls(
        calls, [{"index": 0, "function": {"arguments": "}"}}, {"index": 1, "function": {"arguments": "[]"}}]
    )
    assert [(call["id"], call["function"]) for call in calls] == [
        ("a", {"name": "one", "arguments": "{}"}),
        ("b", {"name": "two", "arguments": "[]"}),
    ]


def test_a_models_text_cannot_steer_the_terminal() -> None:
    assert clean("a\x1b[2Jb\x9bc\x07\td\n") == "a\ufffd[2Jb\ufffdc\ufffd\td\n"


def test_figures_of_an_answer() -> None:
    answer = Answer(finish_reason="length", usage={"prompt_tokens": 5, "completion_tokens": 21}, seconds=2.0)
    assert figures(answer) == "21 tokens, 10 per second; 0 of 5 prompt tokens from the cache (cut at the token limit)"


def test_tools_files(tmp_path: Path) -> None:
    path = tmp_path / "tools.json"
    path.write_text("[{}")
    with pytest.raises(ConfigError, match="not valid JSON"):
        read_tools(path)
    path.write_text('{"name": "x"}')
    with pytest.raises(ConfigError, match="a JSON list of tools"):
        read_tools(path)


def test_demo_tools_run_by_themselves(scripted: Any) -> None:
    call = {"index": 0, "id": "c1", "function": {"name": "calculator", "arguments": '{"expression": "6*7"}'}}
    scripted.say({"tool_calls": [call]}, finish="tool_calls")
    scripted.say("It is 42.")
    done = piped("6*7?", "--url", scripted.url, "--tools", "demo")
    assert (done.returncode, done.stdout) == (0, 'calculator({"expression": "6*7"})\nIt is 42.\n')
    assert scripted.requests[1]["messages"][-1] == {"role": "tool", "tool_call_id": "c1", "content": "42"}
    assert [tool["function"]["name"] for tool in scripted.requests[0]["tools"]] == [
        "calculator",
        "list_files",
        "read_file",
    ]

"""What the official OpenAI client sees of `tokenrelay serve` with the bundled model."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from serving import BLOCK_TOKENS, Server

CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate an arithmetic expression.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    },
}
READ_FILE = {
    "type": "function",
    "function": {
        "name": "read_file",
        "description": "Read a text file.",
        "parameters": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
    },
}


def test_models(bundled: Server) -> None:
    (model,) = bundled.client.models.list().data
    assert model.id == bundled.model == "tokenrelay-tiny"


def test_chat(bundled: Server) -> None:
    reply = bundled.chat("hello")
    (choice,) = reply.choices
    assert choice.finish_reason == "stop"
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert "<|im_" not in choice.message.content
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert 0 < reply.usage.completion_tokens < 128


def test_streaming_gives_the_same_text_in_pieces(bundled: Server) -> None:
    whole = bundled.chat("hello")
    chunks = list(bundled.chat("hello", stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].usage == whole.usage or chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({c.id for c in chunks}) == 1


# Question, expression, value; file, what it says. The model is made to get 95 of 100 right, so four of five must be.
CALCULATIONS = [
    ("What is 123 * 45?", "123 * 45", "5535"),
    ("what is 12 plus 7?", "12 + 7", "19"),
    ("Please compute 99 - 31.", "99 - 31", "68"),
    ("how much is 8 times 9?", "8 * 9", "72"),
    ("calculate 640 / 16", "640 / 16", "40"),
]
FILES = [
    ("notes.txt", "The cup is in room 7."),
    ("todo.md", "The team meets on Monday at 3."),
    ("plan.txt", "The budget is 350 euros."),
    ("server.log", "The server runs on port 8080."),
    ("report.md", "Version 2 is due on Friday."),
]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_calculator_round_trips(bundled: Server, stream: bool) -> None:
    tools = [CALCULATOR, READ_FILE]
    replies = [
        round_trip(bundled, question, tools, "calculator", {"expression": expression}, value, stream)
        for question, expression, value in CALCULATIONS
    ]
    right = [value in (reply or "") for reply, (_, _, value) in zip(replies, CALCULATIONS, strict=True)]
    assert sum(right) >= 4, replies


def test_file_round_trips(bundled: Server) -> None:
    tools = [READ_FILE, CALCULATOR]
    replies = [
        round_trip(bundled, f"Please read {path}.", tools, "read_file", {"path": path}, text, False)
        for path, text in FILES
    ]
    right = [text in (reply or "") for reply, (_, text) in zip(replies, FILES, strict=True)]
    assert sum(right) >= 4, replies


def round_trip(
    server: Server, question: str, tools: list[Any], name: str, arguments: Any, result: str, stream: bool
) -> str | None:
    """The model calls the tool, we answer, it answers; None where its call was not the expected one."""
    dialogue: list[Any] = [{"role": "user", "content": question}]
    calls, finish = tool_calls(server, dialogue, tools, stream)
    if not calls:
        assert finish in ("stop", "length")
        return None
    assert finish == "tool_calls"
    if [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls] != [(name, arguments)]:
        return None
    dialogue += [
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": calls[0]["id"], "content": result},
    ]
    answer = server.chat(*dialogue, tools=tools).choices[0]
    assert answer.finish_reason in ("stop", "length")
    return str(answer.message.content)


def tool_calls(server: Server, dialogue: list[Any], tools: list[Any], stream: bool) -> tuple[list[Any], str]:
    """The calls of a reply as the client gathers them, and its finish_reason."""
    reply = server.chat(*dialogue, tools=tools, stream=stream)
    if not stream:
        choice = reply.choices[0]
        return [call.model_dump() for call in choice.message.tool_calls or []], choice.finish_reason
    calls: dict[int, dict[str, Any]] = {}
    finish = ""
    for chunk in reply:
        choice = chunk.choices[0]
        finish = choice.finish_reason or finish
        for part in choice.delta.tool_calls or []:
            call = calls.setdefault(part.index, {"type": "function", "function": {"name": "", "arguments": ""}})
            call["id"] = part.id or call["id"]
            call["function"]["name"] += part.function.name or ""
            call["function"]["arguments"] += part.function.arguments or ""
    return list(calls.values()), finish


ODD = "zq 93 !! vlk ### 7 wux, purple eleven?"


def test_two_choices(bundled: Server) -> None:
    # The model is sure of its own world: at the highest temperature, and outside it, two draws differ.
    reply = bundled.chat(ODD, n=2, temperature=2.0, seed=3, max_tokens=48)
    assert [choice.index for choice in reply.choices] == [0, 1]
    assert reply.choices[0].message.content != reply.choices[1].message.content
    again = bundled.chat(ODD, n=2, temperature=2.0, seed=3, max_tokens=48)
    assert texts(again) == texts(reply)
    alone = bundled.chat(ODD, temperature=2.0, seed=3, max_tokens=48)
    assert texts(alone) == texts(reply)[:1], "the first choice does not depend on there being a second"


def texts(reply: Any) -> list[str]:
    return [choice.message.content for choice in reply.choices]


def test_seed_reproduces_and_matters(bundled: Server) -> None:
    first, same, other = (
        bundled.chat("tell me a joke", temperature=2.0, seed=seed, max_tokens=48, extra_body={"ignore_eos": True})
        for seed in (11, 11, 12)
    )
    assert texts(first) == texts(same)
    assert texts(first) != texts(other)
    assert first.usage.completion_tokens == 48


def test_logprobs(bundled: Server) -> None:
    reply = bundled.chat("hello", logprobs=True, top_logprobs=3)
    tokens = reply.choices[0].logprobs.content
    text = b"".join(bytes(token.bytes) for token in tokens if token.bytes is not None).decode()
    assert text.startswith(reply.choices[0].message.content)
    for token in tokens:
        assert token.logprob <= 0
        values = [top.logprob for top in token.top_logprobs]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert token.logprob == pytest.approx(values[0], abs=1e-6), "greedy takes the most likely"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_stop_strings_never_show(bundled: Server, stream: bool) -> None:
    whole = bundled.chat("hello").choices[0].message.content
    stop = whole[3:6]
    assert len(stop) == 3
    reply = bundled.chat("hello", stop=[stop, "never"], stream=stream)
    if stream:
        choices = [chunk.choices[0] for chunk in reply if chunk.choices]
        text, finish = "".join(c.delta.content or "" for c in choices), choices[-1].finish_reason
    else:
        text, finish = reply.choices[0].message.content, reply.choices[0].finish_reason
    assert (text, finish) == (whole[: whole.index(stop)], "stop")


def test_length(bundled: Server) -> None:
    reply = bundled.chat("hello", max_tokens=2)
    assert (reply.choices[0].finish_reason, reply.usage.completion_tokens) == ("length", 2)


def test_completions_take_and_give_token_ids(bundled: Server) -> None:
    def complete(prompt: Any, **extra: Any) -> Any:
        return bundled.client.completions.create(
            model=bundled.model,
            prompt=prompt,
            temperature=0,
            max_tokens=8,
            extra_body={"return_token_ids": True, **extra},
        )

    first = complete("The agent reads")
    choice = first.choices[0]
    assert len(choice.token_ids) == first.usage.completion_tokens
    assert len(choice.prompt_token_ids) == first.usage.prompt_tokens
    by_ids = complete(choice.prompt_token_ids)
    assert (by_ids.choices[0].text, by_ids.choices[0].token_ids) == (choice.text, choice.token_ids)
    resumed = complete(choice.prompt_token_ids + choice.token_ids[:4])
    assert resumed.choices[0].token_ids[:4] == choice.token_ids[4:], "greedy goes on where it was"


def test_a_second_turn_finds_the_first_in_the_cache(bundled: Server) -> None:
    story = "Remember this well: " + " ".join(f"box {number} holds {number * 7} nuts." for number in range(60))
    ids = {"extra_body": {"return_token_ids": True}}
    first = bundled.chat(story, **ids)
    known = first.prompt_token_ids + first.choices[0].token_ids[:-1]  # the last token was never fed back
    dialogue = [
        {"role": "user", "content": story},
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "thanks"},
    ]
    second = bundled.chat(*dialogue, **ids)
    common = common_prefix(known, second.prompt_token_ids)
    assert common > 3 * BLOCK_TOKENS
    # Full blocks, and of a block that is shared in part what it begins with.
    assert common // BLOCK_TOKENS * BLOCK_TOKENS <= second.usage.prompt_tokens_details.cached_tokens <= common
    assert (first.usage.prompt_tokens_details.cached_tokens or 0) < BLOCK_TOKENS


def common_prefix(first: list[int], second: list[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"temperature": -1}, 400, "temperature"),
        ({"n": 100_000}, 400, "n"),
        ({"model": "nobody"}, 404, "model"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "long " * 200_000}]}, 400, "messages"),
        ({"stop": ["x"] * 10_000}, 400, "stop"),
    ],
    ids=["temperature", "n", "model", "empty", "long", "stops"],
)
def test_what_cannot_be_served_is_refused_by_name(bundled: Server, change: Any, status: int, param: str) -> None:
    body = {"model": bundled.model, "messages": [{"role": "user", "content": "x"}], **change}
    with pytest.raises(openai.APIStatusError) as refused:
        bundled.client.chat.completions.create(**body)
    assert refused.value.status_code == status
    assert (refused.value.param or "").startswith(param)

"""Completions: every form of prompt, streams, log-probabilities."""

from __future__ import annotations

from typing import Any

from mock_worker import Script
from router_stack import Stack

from tokenrelay.services.router.tokenize import unpack_ids


async def complete(stack: Stack, prompt: Any, **body: Any) -> Any:
    status, reply = await stack.post("/v1/completions", {"model": "mock", "prompt": prompt, **body})
    assert status == 200, reply
    return reply


def submitted(stack: Stack) -> list[list[int]]:
    return [unpack_ids(submit.token_ids) for submit in stack.worker.submits]


async def test_forms_of_prompts(stack: Stack) -> None:
    ids = stack.worker.ids
    await complete(stack, "The quick")
    await complete(stack, ["The quick", "brown"])
    await complete(stack, [5, 6, 7])
    await complete(stack, [[5, 6], [7]])
    await complete(stack, ["fox", [8]])
    assert submitted(stack) == [
        *[ids("The quick"), ids("The quick"), ids("brown")],
        *[[5, 6, 7], [5, 6], [7], ids("fox"), [8]],
    ]


async def test_choices_of_several_prompts(stack: Stack) -> None:
    stack.worker.host.answer = lambda submit: Script(
        [*stack.worker.ids(f"{unpack_ids(submit.token_ids)[0]} {submit.choice}"), stack.worker.eos]
    )
    reply = await complete(stack, [[5], [6]], n=2)
    assert [(choice["index"], choice["text"]) for choice in reply["choices"]] == [
        *[(0, "5 0"), (1, "5 1"), (2, "6 0"), (3, "6 1")]
    ]
    assert reply["usage"]["prompt_tokens"] == 2


async def test_stream(stack: Stack) -> None:
    body = {"prompt": "x", "stream_options": {"include_usage": True}, "return_token_ids": True, "logprobs": 2}
    events = await stack.stream("/v1/completions", body)
    assert events[-1] == "[DONE]"
    chunks = [event["choices"][0] for event in events[:-2]]
    assert "".join(chunk["text"] for chunk in chunks) == "Hello world!"
    assert chunks[-1]["finish_reason"] == "stop"
    assert chunks[0]["prompt_token_ids"] == stack.worker.ids("x")
    assert [token for chunk in chunks for token in chunk["token_ids"]] == [
        *stack.worker.ids("Hello world!"),
        stack.worker.eos,
    ]
    whole = await complete(stack, "x", logprobs=2)
    for field in ("tokens", "text_offset", "token_logprobs", "top_logprobs"):
        streamed = [entry for chunk in chunks for entry in chunk["logprobs"][field]]
        assert streamed == whole["choices"][0]["logprobs"][field]


async def test_logprobs(stack: Stack) -> None:
    logprobs = (await complete(stack, "x", logprobs=2))["choices"][0]["logprobs"]
    tokens = logprobs["tokens"]
    assert "".join(tokens) == "Hello world!<|im_end|>"
    assert logprobs["text_offset"] == [sum(map(len, tokens[:index])) for index in range(len(tokens))]
    assert all(len(top) == 2 and token in top for token, top in zip(tokens, logprobs["top_logprobs"], strict=True))
    as_ids = (await complete(stack, "x", logprobs=0, return_tokens_as_token_ids=True))["choices"][0]["logprobs"]
    assert as_ids["tokens"][0] == f"token_id:{stack.worker.ids('Hello')[0]}"
    assert (await complete(stack, "x"))["choices"][0]["logprobs"] is None


async def test_special_tokens(stack: Stack) -> None:
    token_ids = [stack.worker.tokenizer.token_to_id("<|im_start|>"), *stack.worker.ids("a<think>b")]
    stack.worker.host.answer = lambda submit: Script(token_ids)
    assert (await complete(stack, "x"))["choices"][0]["text"] == "a<think>"
    shown = await complete(stack, "x", skip_special_tokens=False)
    assert shown["choices"][0]["text"] == "<|im_start|>a<think>"

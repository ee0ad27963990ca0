"""The official client, against the router on a real port."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import openai
import pytest
from mock_worker import Script
from router_stack import Stack

from tokenrelay.proto import worker_pb2

USER = {"role": "user", "content": "Hi"}


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=stack.url + "/v1", api_key="unused", max_retries=0) as client:
        yield client


async def test_chat_and_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["mock"]
    reply = await client.chat.completions.create(model="mock", messages=[USER], n=2, logprobs=True, top_logprobs=2)
    assert [choice.message.content for choice in reply.choices] == ["Hello world!"] * 2
    assert reply.choices[0].logprobs.content[0].top_logprobs[0].logprob == -0.5
    assert reply.usage.prompt_tokens_details.cached_tokens == 0
    completion = await client.completions.create(model="mock", prompt="x", logprobs=1)
    assert completion.choices[0].text == "Hello world!"


async def test_streaming_helper(client: openai.AsyncOpenAI) -> None:
    async with client.chat.completions.stream(
        model="mock", messages=[USER], stream_options={"include_usage": True}
    ) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == "Hello world!"
    assert final.usage.completion_tokens > 0


async def test_tool_round_trip(stack: Stack, client: openai.AsyncOpenAI) -> None:
    stack.worker.say('<tool_call>\n{"name": "read", "arguments": {"path": "a"}}\n</tool_call>')
    stack.worker.host.step_s = 0.001
    tools = [{"type": "function", "function": {"name": "read", "parameters": {"type": "object", "properties": {}}}}]
    async with client.chat.completions.stream(model="mock", messages=[USER], tools=tools) as stream:
        message = (await stream.get_final_completion()).choices[0].message
    call = message.tool_calls[0]
    assert (call.function.name, json.loads(call.function.arguments)) == ("read", {"path": "a"})
    stack.worker.say("It says b.")
    reply = await client.chat.completions.create(
        model="mock",
        messages=[
            USER,
            message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": "b"},
        ],
        tools=tools,
    )
    assert reply.choices[0].message.content == "It says b."


async def test_errors_have_their_classes(stack: Stack, client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        await client.chat.completions.create(model="mock", messages=[USER], temperature=9)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.NotFoundError):
        await client.chat.completions.create(model="none", messages=[USER])
    stack.worker.host.answer = lambda submit: Script([], refuse=worker_pb2.REJECT_QUEUE_FULL)
    with pytest.raises(openai.RateLimitError) as limited:
        await client.chat.completions.create(model="mock", messages=[USER])
    assert limited.value.response.headers["retry-after"] == "1"


async def test_an_error_in_a_stream_raises(stack: Stack, client: openai.AsyncOpenAI) -> None:
    stack.worker.host.answer = lambda submit: Script(stack.worker.ids("some words"), finish=worker_pb2.FINISH_NONE)
    stream = await client.chat.completions.create(model="mock", messages=[USER], stream=True)
    with pytest.raises(openai.APIError):
        async for chunk in stream:
            if chunk.choices[0].delta.content:
                await stack.worker.stop()

"""OpenAI's Responses, by the official client against the router on a real port."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from mock_worker import Script
from router_stack import Stack, StartStack

from tokenrelay.proto import worker_pb2
from tokenrelay.services.router.openai_types import Message
from tokenrelay.services.router.responses_store import ResponseStore, Stored

TOOLS: list[Any] = [
    {
        "type": "function",
        "name": "read",
        "description": "Read a file.",
        "parameters": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
        "strict": False,
    }
]
CALL = '<tool_call>\n{"name": "read", "arguments": {"path": "%s"}}\n</tool_call>'


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=stack.url + "/v1", api_key="unused", max_retries=0) as client:
        yield client


def prompt_of(stack: Stack) -> str:
    """What the last sequence was asked, as text."""
    packed = stack.worker.submits[-1].token_ids
    ids = [int.from_bytes(packed[start : start + 4], "little") for start in range(0, len(packed), 4)]
    return str(stack.worker.tokenizer.decode(ids, skip_special_tokens=False))


async def test_a_response(client: openai.AsyncOpenAI, stack: Stack) -> None:
    reply = await client.responses.create(model="mock", input="Hi", instructions="Be brief.", metadata={"a": "b"})
    assert (reply.status, reply.output_text, reply.object) == ("completed", "Hello world!", "response")
    assert [item.type for item in reply.output] == ["message"]
    assert reply.usage.total_tokens == reply.usage.input_tokens + reply.usage.output_tokens
    assert (reply.metadata, reply.instructions, reply.error) == ({"a": "b"}, "Be brief.", None)
    assert prompt_of(stack).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>")
    assert await client.responses.retrieve(reply.id) == reply
    await client.responses.delete(reply.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(reply.id)


def folded(kinds: list[str]) -> list[str]:
    return [kind for index, kind in enumerate(kinds) if index == 0 or kinds[index - 1] != kind]


async def test_events_of_a_stream_in_their_documented_order(client: openai.AsyncOpenAI, stack: Stack) -> None:
    stack.worker.say(f"<think>\nHm.\n</think>\n\nLet me see.\n{CALL % 'a'}\nAnd\n{CALL % 'b'}")
    stack.worker.host.step_s = 0.001
    events = [
        event async for event in await client.responses.create(model="mock", input="Hi", tools=TOOLS, stream=True)
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))

    def item(kind: str, *, part: bool = True) -> list[str]:
        parts = ["response.content_part.added"] if part else []
        parts += [f"response.{kind}.delta", f"response.{kind}.done"]
        parts += ["response.content_part.done"] if part else []
        return ["response.output_item.added", *parts, "response.output_item.done"]

    call = item("function_call_arguments", part=False)
    assert folded([event.type for event in events]) == [
        "response.created",
        "response.in_progress",
        *item("reasoning_text"),
        *item("output_text"),
        *call,
        *item("output_text"),
        *call,
        "response.completed",
    ]
    done = [event for event in events if event.type == "response.output_item.done"]
    assert [event.output_index for event in done] == [0, 1, 2, 3, 4]
    final = events[-1].response
    assert [event.item for event in done] == final.output
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call", "message", "function_call"]
    arguments: dict[int, str] = {}
    for event in events:
        if event.type == "response.function_call_arguments.delta":
            arguments[event.output_index] = arguments.get(event.output_index, "") + event.delta
    assert [json.loads(text) for text in arguments.values()] == [{"path": "a"}, {"path": "b"}]
    assert [item.arguments for item in final.output if item.type == "function_call"] == list(arguments.values())
    assert 0 < final.usage.output_tokens_details.reasoning_tokens < final.usage.output_tokens


async def test_a_stream_says_what_the_whole_reply_says(client: openai.AsyncOpenAI, stack: Stack) -> None:
    stack.worker.say(f"<think>\nHm.\n</think>\n\nLet me see.\n{CALL % 'a'}")
    whole = await client.responses.create(model="mock", input="Hi", tools=TOOLS)
    async with client.responses.stream(model="mock", input="Hi", tools=TOOLS) as stream:
        final = await stream.get_final_response()

    def said(reply: Any) -> list[Any]:
        gone = {"id", "call_id", "parsed_arguments", "parsed"}
        items = [item.to_dict() for item in reply.output]
        return [{key: value for key, value in item.items() if key not in gone} for item in items]

    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call"]
    assert [item["type"] for item in said(final)] == [item["type"] for item in said(whole)]
    assert said(final)[0] == said(whole)[0]
    assert final.output_text == whole.output_text == "Let me see."
    assert final.output[2].arguments == whole.output[2].arguments
    assert (final.usage, final.status) == (whole.usage, whole.status)


@pytest.mark.parametrize("stored", [True, False], ids=["previous_response_id", "items"])
async def test_tools_and_back(client: openai.AsyncOpenAI, stack: Stack, stored: bool) -> None:
    stack.worker.say(f"<think>\nHm.\n</think>\n\nLet me see.\n{CALL % 'a'}{CALL % 'b'}")
    asked: dict[str, Any] = {"model": "mock", "tools": TOOLS, "instructions": "Be brief.", "store": stored}
    first = await client.responses.create(input="Hi", include=["reasoning.encrypted_content"], **asked)
    calls = [item for item in first.output if item.type == "function_call"]
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [
        ("read", {"path": "a"}),
        ("read", {"path": "b"}),
    ]
    stack.worker.say("They say c.")
    outputs: list[Any] = [
        {"type": "function_call_output", "call_id": calls[0].call_id, "output": "cc"},
        {"type": "function_call_output", "call_id": calls[1].call_id, "output": [{"type": "input_text", "text": "dd"}]},
    ]
    if stored:
        reply = await client.responses.create(input=outputs, previous_response_id=first.id, **asked)
        assert reply.previous_response_id == first.id
    else:
        history = [{"role": "user", "content": "Hi"}, *(item.to_dict() for item in first.output), *outputs]
        history[1].pop("content")  # as clients do that keep only what is sealed
        reply = await client.responses.create(input=history, **asked)
    assert reply.output_text == "They say c."
    turns = [
        "user\nHi",
        f"assistant\n<think>\nHm.\n</think>\nLet me see.\n{CALL % 'a'}\n{CALL % 'b'}",
        "tool\ncc",
        "tool\ndd",
    ]
    assert prompt_of(stack).split("<|im_start|>")[-5:] == [*(f"{turn}<|im_end|>\n" for turn in turns), "assistant\n"]
    if stored:
        await client.responses.create(input="And?", previous_response_id=reply.id, **asked)
        assert prompt_of(stack).split("<|im_start|>")[-4:-1] == [
            "tool\ndd<|im_end|>\n",
            "assistant\nThey say c.<|im_end|>\n",
            "user\nAnd?<|im_end|>\n",
        ]
        assert prompt_of(stack).count("Be brief.") == 1, "instructions are not inherited"
        again = await client.responses.create(input=outputs, previous_response_id=first.id, **asked)
        assert again.output_text == "They say c.", "two may go on from one response"


async def test_what_is_not_stored_cannot_be_gone_on_from(client: openai.AsyncOpenAI, stack: Stack) -> None:
    reply = await client.responses.create(model="mock", input="Hi", store=False)
    for response_id in (reply.id, "resp-none"):
        with pytest.raises(openai.BadRequestError) as gone:
            await client.responses.create(model="mock", input="Hi", previous_response_id=response_id)
        assert (gone.value.param, gone.value.code) == ("previous_response_id", "previous_response_not_found")


async def test_a_response_is_its_tenants_own(client: openai.AsyncOpenAI) -> None:
    reply = await client.responses.create(model="mock", input="Hi")
    other = client.with_options(api_key="another")
    with pytest.raises(openai.BadRequestError):
        await other.responses.create(model="mock", input="Hi", previous_response_id=reply.id)
    for attempt in (other.responses.retrieve, other.responses.delete):
        with pytest.raises(openai.NotFoundError):
            await attempt(reply.id)
    assert (await client.responses.retrieve(reply.id)).id == reply.id


@pytest.mark.parametrize("stream", [False, True])
async def test_a_response_that_was_cut(client: openai.AsyncOpenAI, stack: Stack, stream: bool) -> None:
    stack.worker.say(f"See: {CALL % 'a'}")
    cut = len(stack.worker.ids("See: " + (CALL % "a")[:45]))
    asked: dict[str, Any] = {"model": "mock", "input": "Hi", "tools": TOOLS, "max_output_tokens": cut}
    if stream:
        reply = [event async for event in await client.responses.create(stream=True, **asked)][-1].response
        assert [(item.type, item.status) for item in reply.output][1] == ("function_call", "incomplete")
    else:
        reply = await client.responses.create(**asked)
        assert all(item.type == "message" for item in reply.output[-1:])
    assert (reply.status, reply.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert reply.output_text.startswith("See:" + (CALL % "a")[:40])
    again = await client.responses.create(model="mock", input="Go on.", previous_response_id=reply.id)
    assert again.status == "completed", "a call that was cut awaits no output"


async def test_failures(client: openai.AsyncOpenAI, stack: Stack) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        await client.responses.create(model="mock", input="Hi", max_output_tokens=0)
    assert (bad.value.param, bad.value.type) == ("max_output_tokens", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as long:
        await client.responses.create(model="mock", input="word " * 5000)
    assert (long.value.param, long.value.code) == ("input", "context_length_exceeded")
    stack.worker.host.answer = lambda submit: Script([], refuse=worker_pb2.REJECT_QUEUE_FULL)
    with pytest.raises(openai.RateLimitError):
        await client.responses.create(model="mock", input="Hi")


async def test_a_stream_that_fails_says_so(client: openai.AsyncOpenAI, stack: Stack) -> None:
    stack.worker.host.answer = lambda submit: Script(stack.worker.ids("some words"), finish=worker_pb2.FINISH_NONE)
    kinds = []
    async for event in await client.responses.create(model="mock", input="Hi", stream=True):
        kinds.append(event.type)
        if event.type == "response.output_text.delta" and kinds.count(event.type) == 1:
            await stack.worker.stop()
    assert kinds[-1] == "response.failed"
    assert event.response.error.code == "server_error"
    assert event.response.output[0].status == "incomplete"


CALLED = {"type": "function_call", "call_id": "c1", "name": "read", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "x"}
BAD = [
    ({"input": []}, "input", "there is nothing in it"),
    ({"input": 5}, "input", "Expected `str | array`"),
    ({"input": [{"type": "image"}]}, "input[0].type", "items of type 'image'"),
    ({"input": [{"role": "wizard", "content": "x"}]}, "input[0].role", "'wizard' is none of"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]", "only text"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text", "a string"),
    ({"input": [{"type": "message", "role": "user"}]}, "input[0].content", "missing required field"),
    ({"input": [{**CALLED, "arguments": {}}, OUTPUT]}, "input[0].arguments", "Expected `str`"),
    ({"input": [OUTPUT]}, "input[0].call_id", "No tool call found for function call output with call_id c1."),
    ({"input": [CALLED]}, "input", "No tool output found for function call c1."),
    ({"input": [CALLED, CALLED]}, "input[1].call_id", "two calls"),
    ({"tools": [{"type": "mcp"}]}, "tools[0].type", "'mcp' is not known"),
    ({"tools": [{"type": "function"}]}, "tools[0].name", "expected a string"),
    ({"tools": [{"type": "function", "name": "x", "parameters": []}]}, "tools[0].parameters", "an object"),
    ({"tools": TOOLS * 1025}, "tools", "1025 tools, at most 1024"),
    ({"tools": TOOLS, "tool_choice": {"type": "mcp"}}, "tool_choice", 'expected "auto"'),
    ({"background": True}, "background", "while its request is open"),
    ({"conversation": "c"}, "conversation", "use previous_response_id"),
    ({"truncation": "auto"}, "truncation", "nothing is left out"),
    ({"top_logprobs": 3}, "top_logprobs", "chat completions"),
    ({"temperature": 3}, "temperature", "must be in [0, 2]"),
    ({"max_output_tokens": -1}, "max_output_tokens", "must be in [1,"),
]


@pytest.mark.parametrize(("fields", "param", "message"), BAD, ids=[f"{param}: {text[:20]}" for _, param, text in BAD])
async def test_bad_input_names_the_field(stack: Stack, fields: Any, param: str, message: str) -> None:
    status, reply = await stack.post("/v1/responses", {"model": "mock", "input": "Hi", **fields})
    assert status == 400, reply
    assert (reply["error"]["type"], reply["error"]["param"]) == ("invalid_request_error", param)
    assert message in reply["error"]["message"]


async def test_hosted_tools_that_clients_always_offer_are_left_out(stack: Stack) -> None:
    body = {"model": "mock", "input": "Hi", "tools": [{"type": "web_search", "external_web_access": False}]}
    status, _ = await stack.post("/v1/responses", body)
    assert status == 200
    assert "web_search" not in prompt_of(stack)


async def test_the_store_is_bounded(start_stack: StartStack) -> None:
    stack = await start_stack(response_store_bytes=20_000)
    ids = []
    for _ in range(30):
        _, reply = await stack.post("/v1/responses", {"model": "mock", "input": "Hi"})
        ids.append(reply["id"])
    store = stack.service.state.responses
    assert 5 < len(store) < 20
    assert store.bytes <= 20_000
    assert [
        (await stack.post("/v1/responses", {"input": "x", "previous_response_id": one}))[0] for one in (ids[0], ids[-1])
    ] == [
        400,
        200,
    ]


def stored(name: str, size: int) -> Stored:
    return Stored(name, (Message(role="user", content="x" * size),), frozenset(), b"{}")


def test_the_store_forgets_what_was_not_used_for_longest() -> None:
    store = ResponseStore(10_000)
    for name in "abc":
        store.put(b"t", stored(name, 2_000))
    assert store.get(b"t", "a")
    store.put(b"t", stored("d", 2_000))
    assert [name for name in "abcd" if store.get(b"t", name)] == ["a", "c", "d"]
    store.put(b"t", stored("huge", 10_000))
    assert store.get(b"t", "huge") is None
    assert [name for name in "acd" if store.get(b"t", name)] == ["a", "c", "d"], "what does not fit throws out nothing"
    for name in "acd":
        assert store.drop(b"t", name)
    assert (store.bytes, len(store), store.drop(b"t", "a")) == (0, 0, False)

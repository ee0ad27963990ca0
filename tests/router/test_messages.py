"""Anthropic's Messages, by its official client against the router on a real port."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import pytest
from mock_worker import BLOCK_TOKENS, Script, write_model_folder
from router_stack import Stack, StartStack, until

from tokenrelay.proto import worker_pb2

USER = {"role": "user", "content": "Hi"}
TOOLS = [
    {
        "name": "read",
        "description": "Read a file.",
        "input_schema": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
    }
]
CALL = '<tool_call>\n{"name": "read", "arguments": {"path": "%s"}}\n</tool_call>'


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=stack.url, api_key="unused", max_retries=0) as client:
        yield client


def prompt_of(stack: Stack) -> str:
    """What the last sequence was asked, as text."""
    packed = stack.worker.submits[-1].token_ids
    ids = [int.from_bytes(packed[start : start + 4], "little") for start in range(0, len(packed), 4)]
    return str(stack.worker.tokenizer.decode(ids, skip_special_tokens=False))


async def create(client: anthropic.AsyncAnthropic, *messages: Any, **extra: Any) -> Any:
    return await client.messages.create(
        **{"model": "mock", "max_tokens": 64, "messages": list(messages) or [USER], **extra}
    )


async def events_of(client: anthropic.AsyncAnthropic, **extra: Any) -> list[Any]:
    return [event async for event in await create(client, stream=True, **extra)]


async def test_a_message(client: anthropic.AsyncAnthropic, stack: Stack) -> None:
    reply = await create(client, system="Be brief.", metadata={"user_id": "u"}, stop_sequences=["STOP"])
    assert (reply.type, reply.role, reply.model, reply.stop_reason) == ("message", "assistant", "mock", "end_turn")
    assert [block.to_dict() for block in reply.content] == [{"type": "text", "text": "Hello world!"}]
    assert reply.id.startswith("msg")
    assert reply._request_id
    assert prompt_of(stack).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>")
    count = await client.messages.count_tokens(model="mock", messages=[USER], system="Be brief.")
    assert count.input_tokens == reply.usage.input_tokens


async def test_a_worker_is_told_that_a_message_has_tools(client: anthropic.AsyncAnthropic, stack: Stack) -> None:
    """A hint for its eviction; tools that the model is not shown are none."""
    await create(client)
    await create(client, tools=TOOLS)
    await create(client, tools=TOOLS, tool_choice={"type": "none"})
    assert [submit.tools for submit in stack.worker.submits] == [False, True, False]


async def test_models(client: anthropic.AsyncAnthropic) -> None:
    page = await client.models.list()
    assert [(model.id, model.type) for model in page.data] == [("mock", "model")]
    assert (await client.models.retrieve("mock")).display_name == "mock"


async def test_events_of_a_stream_in_their_documented_order(client: anthropic.AsyncAnthropic, stack: Stack) -> None:
    stack.worker.say(f"Let me see.\n{CALL % 'a'}\nAnd\n{CALL % 'b'}")
    stack.worker.host.step_s = 0.001
    events = await events_of(client, tools=TOOLS)
    kinds = [event.type for event in events]
    folded = [kind for index, kind in enumerate(kinds) if index == 0 or kinds[index - 1] != kind]
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert folded == ["message_start", *block * 4, "message_delta", "message_stop"]
    assert [event.index for event in events if event.type == "content_block_start"] == [0, 1, 2, 3]
    start = events[0].message
    assert (start.content, start.stop_reason, start.usage.output_tokens) == ([], None, 0)
    blocks = [event.content_block for event in events if event.type == "content_block_start"]
    assert [one.type for one in blocks] == ["text", "tool_use", "text", "tool_use"]
    assert [one.input for one in blocks if one.type == "tool_use"] == [{}, {}]
    deltas: dict[int, str] = {}
    for event in events:
        if event.type == "content_block_delta":
            piece = event.delta.text if event.delta.type == "text_delta" else event.delta.partial_json
            deltas[event.index] = deltas.get(event.index, "") + piece
    assert (deltas[0], deltas[2]) == ("Let me see.", "And")
    assert [json.loads(deltas[index]) for index in (1, 3)] == [{"path": "a"}, {"path": "b"}]
    assert (events[-2].delta.stop_reason, events[-2].usage.input_tokens) == ("tool_use", start.usage.input_tokens)
    assert events[-2].usage.output_tokens > 10


@pytest.mark.parametrize("stream", [False, True])
async def test_tools_and_back(client: anthropic.AsyncAnthropic, stack: Stack, stream: bool) -> None:
    stack.worker.say(f"Let me see.\n{CALL % 'a'}{CALL % 'b'}")
    asked: dict[str, Any] = {"model": "mock", "max_tokens": 200, "messages": [USER], "tools": TOOLS}
    if stream:
        async with client.messages.stream(**asked) as events:
            reply = await events.get_final_message()
    else:
        reply = await client.messages.create(**asked)
    assert reply.stop_reason == "tool_use"
    assert [block.type for block in reply.content] == ["text", "tool_use", "tool_use"]
    calls = [block for block in reply.content if block.type == "tool_use"]
    assert [(call.name, call.input) for call in calls] == [("read", {"path": "a"}), ("read", {"path": "b"})]
    stack.worker.say("They say c.")
    results = [
        {"type": "tool_result", "tool_use_id": calls[0].id, "content": "cc"},
        {"type": "tool_result", "tool_use_id": calls[1].id, "content": [{"type": "text", "text": "dd"}]},
        {"type": "text", "text": "And now?"},
    ]
    turn = {"role": "assistant", "content": [block.to_dict() for block in reply.content]}
    reply = await create(client, USER, turn, {"role": "user", "content": results}, tools=TOOLS)
    assert reply.content[0].text == "They say c."
    expected = [
        f"assistant\nLet me see.\n{CALL % 'a'}\n{CALL % 'b'}",
        "tool\ncc",
        "tool\ndd",
        "user\nAnd now?",
        "assistant\n",
    ]
    assert prompt_of(stack).split("<|im_start|>")[-5:] == [
        turn + ("" if turn == "assistant\n" else "<|im_end|>\n") for turn in expected
    ]


@pytest.mark.parametrize("stream", [False, True])
async def test_what_only_looks_like_a_call_is_text(
    client: anthropic.AsyncAnthropic, stack: Stack, stream: bool
) -> None:
    stack.worker.say('<tool_call>{"name": "read", "arguments": oops}</tool_call>')
    async with client.messages.stream(model="mock", max_tokens=99, messages=[USER], tools=TOOLS) as events:
        streamed = await events.get_final_message()
    whole = await create(client, tools=TOOLS)
    for reply in (streamed, whole):
        assert [block.to_dict() for block in reply.content] == [
            {"type": "text", "text": '<tool_call>{"name": "read", "arguments": oops}</tool_call>'}
        ]
        assert reply.stop_reason == "end_turn"


async def test_thinking(client: anthropic.AsyncAnthropic, stack: Stack) -> None:
    stack.worker.say("Well, 2.\n</think>\n\nIt is 2.")
    asked: dict[str, Any] = {"model": "mock", "max_tokens": 2048, "messages": [USER]}
    asked["thinking"] = {"type": "enabled", "budget_tokens": 1024}
    reply = await client.messages.create(**asked)
    assert prompt_of(stack).endswith("<think>\n")
    assert [block.type for block in reply.content] == ["thinking", "text"]
    assert (reply.content[0].thinking, reply.content[1].text) == ("Well, 2.", "It is 2.")
    async with client.messages.stream(**asked) as events:
        kinds = [event.delta.type async for event in events if event.type == "content_block_delta"]
        streamed = await events.get_final_message()
    assert [block.type for block in streamed.content] == ["thinking", "text"]
    assert streamed.content[0] == reply.content[0], "the signature, too"
    assert list(dict.fromkeys(kinds)) == ["thinking_delta", "signature_delta", "text_delta"]
    turn = {"role": "assistant", "content": [block.to_dict() for block in reply.content]}
    await create(client, USER, turn, {"role": "user", "content": "And?"})
    assert "<think>\nWell, 2.\n</think>\nIt is 2." in prompt_of(stack)
    assert prompt_of(stack).endswith("assistant\n"), "as the template has it"


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_reasons(client: anthropic.AsyncAnthropic, stack: Stack, stream: bool) -> None:
    async def ends(**extra: Any) -> tuple[str, str | None]:
        asked: dict[str, Any] = {"model": "mock", "max_tokens": 64, "messages": [USER], **extra}
        if stream:
            async with client.messages.stream(**asked) as events:
                reply = await events.get_final_message()
        else:
            reply = await client.messages.create(**asked)
        return reply.stop_reason, reply.stop_sequence

    assert await ends(stop_sequences=["wor", "zzz"]) == ("stop_sequence", "wor")
    assert await ends(max_tokens=1) == ("max_tokens", None)
    assert await ends() == ("end_turn", None)
    long = [*stack.worker.ids("word " * 5000), stack.worker.eos]
    stack.worker.host.answer = lambda submit: Script(long, per_step=4096)
    assert await ends(max_tokens=10_000) == ("model_context_window_exceeded", None)


async def test_usage_tells_what_was_cached(client: anthropic.AsyncAnthropic, stack: Stack) -> None:
    ids = [*stack.worker.ids("Yes."), stack.worker.eos]
    stack.worker.host.answer = lambda submit: Script(ids, cached_tokens=BLOCK_TOKENS)
    long = {"role": "user", "content": [{"type": "text", "text": "word " * 200}]}
    tokens = (await client.messages.count_tokens(model="mock", messages=[long])).input_tokens
    usage = (await create(client, long)).usage
    assert (usage.cache_read_input_tokens, usage.cache_creation_input_tokens) == (BLOCK_TOKENS, 0)
    assert usage.input_tokens == tokens - BLOCK_TOKENS
    long["content"][0]["cache_control"] = {"type": "ephemeral", "ttl": "1h"}
    usage = (await create(client, long)).usage
    assert usage.cache_creation_input_tokens == tokens // BLOCK_TOKENS * BLOCK_TOKENS - BLOCK_TOKENS > 0
    assert usage.input_tokens == tokens % BLOCK_TOKENS


async def test_a_line_that_differs_each_time_is_taken_out_of_the_system_prompt(
    client: anthropic.AsyncAnthropic, stack: Stack
) -> None:
    blocks = ["x-anthropic-billing-header: cc_version=1; cch=0a1b;", "Be brief."]
    await create(client, system=[{"type": "text", "text": text} for text in blocks])
    assert prompt_of(stack).startswith("<|im_start|>system\nBe brief.<|im_end|>")


async def test_errors_have_their_classes(client: anthropic.AsyncAnthropic, stack: Stack) -> None:
    with pytest.raises(anthropic.BadRequestError) as bad:
        await create(client, temperature=2)
    assert bad.value.body["error"] == {
        "type": "invalid_request_error",
        "message": "temperature must be in [0, 1], not 2",
    }
    assert bad.value.request_id
    with pytest.raises(anthropic.NotFoundError):
        await create(client, model="none")
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        await create(client, {"role": "user", "content": "word " * 5000})
    stack.worker.host.answer = lambda submit: Script([], refuse=worker_pb2.REJECT_QUEUE_FULL)
    with pytest.raises(anthropic.RateLimitError) as limited:
        await create(client)
    assert limited.value.response.headers["retry-after"] == "1"
    await stack.worker.stop()
    await until(lambda: not stack.service.pool.usable)
    with pytest.raises(anthropic.InternalServerError) as away:
        await create(client)
    assert (away.value.status_code, away.value.body["error"]["type"]) == (503, "overloaded_error")


async def test_an_error_in_a_stream_raises(client: anthropic.AsyncAnthropic, stack: Stack) -> None:
    stack.worker.host.answer = lambda submit: Script(stack.worker.ids("some words"), finish=worker_pb2.FINISH_NONE)
    with pytest.raises(anthropic.APIStatusError) as broken:
        async for event in await create(client, stream=True):
            if event.type == "content_block_delta":
                await stack.worker.stop()
    assert broken.value.body["error"]["type"] == "overloaded_error"


async def test_a_client_that_leaves_is_aborted(client: anthropic.AsyncAnthropic, stack: Stack) -> None:
    stack.worker.host.answer = lambda submit: Script(stack.worker.ids("some words"), finish=worker_pb2.FINISH_NONE)
    stream = await create(client, stream=True)
    await anext(aiter(stream))
    await stream.close()
    await stack.idle()
    assert stack.worker.host.aborted


USE = {"type": "tool_use", "id": "t1", "name": "read", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": "x"}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}


def said(*turns: Any) -> dict[str, Any]:
    """A conversation, the user first."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[index % 2], "content": turn} for index, turn in enumerate(turns)]}


BAD = [
    ({"messages": []}, "messages: at least one message"),
    ({"messages": [{"role": "assistant", "content": "x"}, USER]}, "messages.0.role: the first message"),
    ({"messages": [USER, {"role": "system", "content": "x"}, USER]}, "messages.1.role: 'system' is none of"),
    (said("a", "b"), "messages: the conversation must end with a user message"),
    ({"messages": [{"role": "user"}]}, "messages.0.content: Field required"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content: Expected `str | array`"),
    (said([{"type": "text"}]), "messages.0.content.0.text: Field required"),
    (said([{"type": "video"}]), "messages.0.content.0.type: Invalid value 'video'"),
    (said([IMAGE]), "messages.0.content.0: image blocks are not supported"),
    (said("a", [USE], [{**RESULT, "content": [IMAGE]}]), "messages.2.content.0.content.0: image blocks"),
    (said([USE]), "messages.0.content.0: a user message has no tool_use blocks"),
    (said("a", [RESULT], "b"), "messages.1.content.0: an assistant message has no tool_result"),
    (said([RESULT]), "messages.0.content.0.tool_use_id: each `tool_result`"),
    (said("a", [USE], "b"), "messages.2.content.0: `tool_use` ids were found without"),
    (said("a", [USE], [RESULT, RESULT]), "messages.2.content.1.tool_use_id: each `tool_result`"),
    (said("a", [USE, USE], [RESULT]), "messages.1.content.1.id: `tool_use` ids must be unique"),
    ({"max_tokens": 0}, "max_tokens must be in [1,"),
    ({"max_tokens": None}, "max_tokens: Expected `int`"),
    ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
    ({"stop_sequences": [""]}, "stop_sequences.0 is empty"),
    ({"top_k": -1}, "top_k must be in"),
    ({"system": [{"type": "image"}]}, "system.0.type: Invalid value 'image'"),
    ({"tools": [{"name": "x"}]}, "tools.0.input_schema: Field required"),
    ({"tools": [{"name": "", "input_schema": {"type": "object"}}]}, "tools.0.name: expected 1 to"),
    ({"tools": [{"name": "x", "input_schema": {"type": "string"}}]}, "tools.0.input_schema.type"),
    ({"tools": TOOLS * 2}, "tools: tool names must be unique"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type: 'web_search_20250305'"),
    ({"tools": [{**TOOLS[0], "name": f"t{n}"} for n in range(1025)]}, "tools: 1025 tools, at most 1024"),
    ({"tool_choice": {"type": "any"}}, "tool_choice: may only be specified while"),
    ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "y"}}, "tool_choice.name: there is no tool 'y'"),
    ({"tools": TOOLS, "tool_choice": {"type": "must"}}, "tool_choice.type: 'must' is none of"),
    ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens: Field required"),
    ({"thinking": {"type": "enabled", "budget_tokens": 5}}, "thinking.budget_tokens: must be 1024"),
    ({"thinking": {"type": "enabled", "budget_tokens": 4096}}, "thinking.budget_tokens: `max_tokens` must be"),
    ({"output_config": {"format": {"type": "yaml"}}}, "output_config.format: must be"),
    ({"mcp_servers": [{"url": "x"}]}, "mcp_servers: nothing is run"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[message[:40] for _, message in BAD])
async def test_bad_input_names_the_field_as_anthropic_does(stack: Stack, fields: Any, message: str) -> None:
    status, reply = await stack.post("/v1/messages", {"model": "mock", "max_tokens": 16, "messages": [USER], **fields})
    assert status == 400, reply
    assert (reply["type"], reply["error"]["type"]) == ("error", "invalid_request_error")
    assert reply["error"]["message"].startswith(message)
    assert reply["request_id"]


async def test_other_refusals_have_the_same_shape(stack: Stack) -> None:
    async with stack.http.post(stack.url + "/v1/messages", data=b'{"model": "\\ud800"') as response:
        reply = await response.json()
        assert (response.status, reply["error"]["type"]) == (400, "invalid_request_error")
    async with stack.http.get(stack.url + "/v1/messages") as response:
        assert (response.status, (await response.json())["type"]) == (405, "error")
    async with stack.http.post(stack.url + "/v1/messages/batches", json={}) as response:
        assert (response.status, (await response.json())["error"]["type"]) == (404, "not_found_error")


async def test_a_body_that_is_too_large(start_stack: StartStack) -> None:
    stack = await start_stack(body_bytes_max=2048)
    status, reply = await stack.post("/v1/messages", {"model": "mock", "messages": [], "x": "y" * 4096})
    assert (status, reply["error"]["type"]) == (413, "request_too_large")


async def test_fields_of_a_beta_are_ignored(stack: Stack) -> None:
    body = {"model": "mock", "max_tokens": 16, "messages": [USER], "context_management": {"edits": []}}
    async with stack.http.post(
        stack.url + "/v1/messages?beta=true", json=body, headers={"anthropic-beta": "context-management-2025-06-27"}
    ) as response:
        assert response.status == 200


async def test_large_tool_schemas(tmp_path: Path, start_stack: StartStack) -> None:
    stack = await start_stack(folder=write_model_folder(tmp_path, chat_template="{{ messages[0].content }}"))
    properties = {f"field_{n}": {"type": "string", "description": "x" * 900} for n in range(1000)}
    tools = [{"name": "t", "input_schema": {"type": "object", "properties": properties}}]
    body = {"model": "mock", "max_tokens": 16, "messages": [USER], "tools": tools}
    status, reply = await stack.post("/v1/messages", body)
    assert (status, reply["stop_reason"]) == (200, "end_turn")


async def test_two_keys_are_two_tenants(stack: Stack) -> None:
    body = {"model": "mock", "max_tokens": 16, "messages": [USER]}
    tenants = []
    for key in ("one", "two", "one"):
        async with stack.http.post(stack.url + "/v1/messages", json=body, headers={"x-api-key": key}) as response:
            assert response.status == 200
        tenants.append(stack.worker.submits[-1].tenant)
    assert tenants[0] == tenants[2] != tenants[1]

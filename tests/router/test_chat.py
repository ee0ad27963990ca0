"""Chat completions, unary and streamed, through real HTTP."""

from __future__ import annotations

import json
from typing import Any

import pytest
from mock_worker import Script, write_model_folder
from router_stack import Stack, StartStack

from tokenrelay.proto import worker_pb2
from tokenrelay.services.router.tokenize import unpack_ids

CALL = '<tool_call>\n{"name": "read_file", "arguments": {"path": "notes.txt"}}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "read_file", "parameters": {"type": "object"}}}]


def joined(events: list[Any], field: str, index: int = 0) -> str:
    """One field of all deltas of one choice."""
    chunks = [event["choices"][0] for event in events if event != "[DONE]" and event["choices"]]
    return "".join(chunk["delta"].get(field) or "" for chunk in chunks if chunk["index"] == index)


def finish_reasons(events: list[Any]) -> list[tuple[int, str]]:
    chunks = [choice for event in events if event != "[DONE]" for choice in event["choices"]]
    return [(chunk["index"], chunk["finish_reason"]) for chunk in chunks if chunk["finish_reason"] is not None]


async def test_hello(stack: Stack) -> None:
    reply = await stack.chat()
    choice = reply["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "Hello world!", "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] is None
    assert reply["object"] == "chat.completion"
    assert reply["model"] == "mock"
    prompt = unpack_ids(stack.worker.submits[0].token_ids)
    assert stack.worker.tokenizer.decode(prompt, skip_special_tokens=False) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    output_tokens = len(stack.worker.ids("Hello world!")) + 1
    assert reply["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": output_tokens,
        "total_tokens": len(prompt) + output_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


@pytest.mark.parametrize("per_step", [1, 3, 100])
async def test_stream(stack: Stack, per_step: int) -> None:
    text = "Größe, 東京, 👋🏽 and the quick brown fox"
    stack.worker.say(text, per_step=per_step)
    events = await stack.chat_stream(stream_options={"include_usage": True})
    assert events[-1] == "[DONE]"
    assert joined(events, "content") == text
    assert "\ufffd" not in json.dumps(events, ensure_ascii=False)
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert sum("role" in event["choices"][0]["delta"] for event in events[:-2]) == 1
    assert finish_reasons(events) == [(0, "stop")]
    assert events[-2]["choices"] == []
    assert events[-2]["usage"]["completion_tokens"] == len(stack.worker.ids(text)) + 1
    assert all(event["usage"] is None for event in events[:-2])
    assert len({event["id"] for event in events[:-1]}) == 1


async def test_no_usage_unless_asked(stack: Stack) -> None:
    events = await stack.chat_stream()
    assert all("usage" not in event for event in events[:-1])
    assert all(event["choices"] for event in events[:-1])


async def test_n_choices_share_seed_and_prompt(stack: Stack) -> None:
    texts = ["first answer", "second one", "third"]
    stack.worker.host.answer = lambda submit: Script([*stack.worker.ids(texts[submit.choice]), stack.worker.eos])
    reply = await stack.chat(n=3, seed=7)
    assert [choice["message"]["content"] for choice in reply["choices"]] == texts
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    assert [(submit.seed, submit.choice) for submit in stack.worker.submits] == [(7, 0), (7, 1), (7, 2)]
    assert reply["usage"]["prompt_tokens"] == len(stack.worker.submits[0].token_ids) // 4, "the prompt counts once"
    events = await stack.chat_stream(n=3)
    assert [joined(events, "content", index) for index in range(3)] == texts
    assert sorted(finish_reasons(events)) == [(0, "stop"), (1, "stop"), (2, "stop")]


async def test_a_seed_is_made_when_none_is_given(stack: Stack) -> None:
    for _ in range(2):
        await stack.chat()
    first, second = (submit.seed for submit in stack.worker.submits)
    assert first != second
    await stack.chat(seed=-1)
    assert stack.worker.submits[-1].seed == (1 << 64) - 1


async def test_parameters_reach_the_worker(stack: Stack) -> None:
    await stack.chat(
        max_completion_tokens=3,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.5,
        logit_bias={"5": -100, "6": 1.5},
        stop_token_ids=[9],
        ignore_eos=True,
        min_tokens=2,
        logprobs=True,
        top_logprobs=4,
        priority=-3,
        tps_floor=120,
        expected_output_tokens=900,
        cache_salt="tenant",
        user="someone",
        metadata={"a": "b"},
        store=True,
        some_new_field={"x": [1]},
    )
    submit = stack.worker.submits[0]
    sampling = submit.sampling
    assert submit.tokens_max == 3
    assert (submit.priority, submit.salt) == (-3, b"tenant")
    assert (submit.tps_floor, submit.expected_tokens) == (120, 900)
    assert [round(value, 3) for value in (sampling.temperature, sampling.top_p, sampling.min_p)] == [0.5, 0.9, 0.1]
    assert (sampling.top_k, sampling.ignore_eos, sampling.tokens_min, sampling.logprobs) == (7, True, 2, 5)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.5, -0.5, 1.5)
    assert {entry.token_id: entry.bias for entry in sampling.logit_bias} == {5: -100, 6: 1.5}
    assert list(sampling.stop_token_ids) == [9]
    assert submit.output_start == len(submit.token_ids) // 4


async def test_a_tenant_is_a_key_and_a_salt(stack: Stack) -> None:
    """Workers share fairly between tenants: they learn which requests are of one, and nothing of the key."""
    for key, salt in (("", ""), ("", "s"), ("Bearer a", ""), ("Bearer a", ""), ("Bearer b", ""), ("Bearer a", "s")):
        body = {"messages": [{"role": "user", "content": "Hi"}], "cache_salt": salt}
        headers = {"Authorization": key} if key else {}
        async with stack.http.post(stack.url + "/v1/chat/completions", json=body, headers=headers) as response:
            assert response.status == 200
    tenants = [submit.tenant for submit in stack.worker.submits]
    assert tenants[:2] == [b"", b""]
    assert tenants[2] == tenants[3] and len(set(tenants[2:])) == 3
    assert all(len(tenant) == 16 for tenant in tenants[2:])


async def test_max_tokens_default_to_the_room_that_is_left(stack: Stack) -> None:
    await stack.chat()
    await stack.chat(max_tokens=10**6)
    for submit in stack.worker.submits:
        assert submit.tokens_max == 4096 - submit.output_start


async def test_defaults_of_the_model(start_stack: StartStack, tmp_path: Any) -> None:
    folder = write_model_folder(tmp_path, temperature=0.25, top_k=11, max_new_tokens=17, eos_token_id=[3, 4])
    stack = await start_stack(folder=folder)
    await stack.chat()
    await stack.chat(temperature=0, top_k=-1, max_tokens=5)
    first, second = stack.worker.submits
    assert (first.sampling.temperature, first.sampling.top_k, first.tokens_max) == (0.25, 11, 17)
    assert {3, 4} <= set(first.sampling.stop_token_ids)
    assert (second.sampling.temperature, second.sampling.top_k, second.tokens_max) == (0, 0, 5)


async def test_length(stack: Stack) -> None:
    stack.worker.say("The quick brown fox jumps over")
    reply = await stack.chat(max_tokens=4)
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 4


# -- stop -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("per_step", [1, 2, 50])
@pytest.mark.parametrize("include", [False, True])
async def test_stop_strings_across_token_borders(stack: Stack, per_step: int, include: bool) -> None:
    stack.worker.say("The quick brown fox jumps over the lazy dog", per_step=per_step)
    wanted = {"stop": ["wn fo", "zzz"], "include_stop_str_in_output": include, "return_token_ids": True}
    reply = await stack.chat(**wanted)
    expected = "The quick brown fo" if include else "The quick bro"
    choice = reply["choices"][0]
    assert choice["message"]["content"] == expected
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "wn fo")
    events = await stack.chat_stream(**wanted)
    assert joined(events, "content") == expected
    # However the worker's steps were merged, tokens behind the stop string are not counted.
    assert "fo" in stack.worker.tokenizer.decode(choice["token_ids"])
    assert "jumps" not in stack.worker.tokenizer.decode(choice["token_ids"])
    assert reply["usage"]["completion_tokens"] == len(choice["token_ids"])
    await stack.idle()


async def test_a_stop_string_aborts_the_sequence(stack: Stack) -> None:
    stack.worker.host.answer = lambda submit: Script(
        stack.worker.ids("one END") * 3, finish=worker_pb2.FINISH_NONE, per_step=1
    )
    reply = await stack.chat(stop="END")
    assert reply["choices"][0]["message"]["content"] == "one "
    await stack.idle()
    assert len(stack.worker.host.aborted) == 1


async def test_text_that_only_began_like_a_stop_string_arrives(stack: Stack) -> None:
    stack.worker.say("An EN")
    assert (await stack.chat(stop="END"))["choices"][0]["message"]["content"] == "An EN"
    assert joined(await stack.chat_stream(stop="END"), "content") == "An EN"


async def test_stop_token_ids(stack: Stack) -> None:
    token_ids = stack.worker.ids("one two three")
    stack.worker.host.answer = lambda submit: Script(token_ids)
    reply = await stack.chat(stop_token_ids=[token_ids[2]])
    choice = reply["choices"][0]
    assert choice["message"]["content"] == stack.worker.tokenizer.decode(token_ids[:2])
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", token_ids[2])
    assert reply["usage"]["completion_tokens"] == 3
    reply = await stack.chat(stop_token_ids=[token_ids[2]], include_stop_str_in_output=True)
    assert reply["choices"][0]["message"]["content"] == stack.worker.tokenizer.decode(token_ids[:3])


# -- logprobs, token ids, cached tokens -------------------------------------------------------------------------------
async def test_logprobs(stack: Stack) -> None:
    stack.worker.say("Größe")
    token_ids = [*stack.worker.ids("Größe"), stack.worker.eos]
    reply = await stack.chat(logprobs=True, top_logprobs=5)
    content = reply["choices"][0]["logprobs"]["content"]
    assert [bytes(entry["bytes"]) for entry in content[:-1]] == [
        stack.service.pool.require_model().vocabulary.token_bytes(token_id) for token_id in token_ids[:-1]
    ]
    assert b"".join(bytes(entry["bytes"]) for entry in content[:-1]).decode() == "Größe"
    assert all(entry["logprob"] == -0.5 and len(entry["top_logprobs"]) == 5 for entry in content)
    assert content[0]["top_logprobs"][4]["logprob"] == -9999.0, "JSON has no -inf"
    events = await stack.chat_stream(logprobs=True, top_logprobs=5)
    streamed = [
        entry for event in events[:-1] for entry in (event["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == content
    assert (await stack.chat(logprobs=True))["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    assert (await stack.chat())["choices"][0]["logprobs"] is None


async def test_token_ids(stack: Stack) -> None:
    expected = [*stack.worker.ids("Hello world!"), stack.worker.eos]
    reply = await stack.chat(return_token_ids=True)
    prompt = unpack_ids(stack.worker.submits[0].token_ids)
    assert reply["prompt_token_ids"] == prompt
    assert reply["choices"][0]["token_ids"] == expected
    events = await stack.chat_stream(return_token_ids=True)
    assert [event["prompt_token_ids"] for event in events[:-1] if "prompt_token_ids" in event] == [prompt]
    assert [token_id for event in events[:-1] for token_id in event["choices"][0]["token_ids"]] == expected


async def test_cached_tokens_are_the_workers(stack: Stack) -> None:
    stack.worker.say("ok", cached_tokens=8)
    reply = await stack.chat(n=2)
    assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == 8


# -- tools and reasoning ----------------------------------------------------------------------------------------------
async def test_tool_calls(stack: Stack) -> None:
    stack.worker.say(f"Let me see.\n{CALL}\n{CALL}")
    reply = await stack.chat(tools=TOOLS)
    choice = reply["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me see."
    calls = choice["message"]["tool_calls"]
    assert [call["function"] for call in calls] == [{"name": "read_file", "arguments": '{"path": "notes.txt"}'}] * 2
    assert len({call["id"] for call in calls}) == 2


async def test_tool_calls_streamed(stack: Stack) -> None:
    stack.worker.say(f"{CALL}\n{CALL}")
    stack.worker.host.step_s = 0.002
    events = await stack.chat_stream(tools=TOOLS)
    arguments, names = {}, {}
    for event in events[:-1]:
        for call in event["choices"][0]["delta"].get("tool_calls", []):
            if "id" in call:
                names[call["index"]] = call["function"]["name"]
            arguments[call["index"]] = arguments.get(call["index"], "") + call["function"]["arguments"]
    assert names == {0: "read_file", 1: "read_file"}
    assert [json.loads(text) for text in arguments.values()] == [{"path": "notes.txt"}] * 2
    assert joined(events, "content") == ""
    assert finish_reasons(events) == [(0, "tool_calls")]
    pieces = sum("tool_calls" in event["choices"][0]["delta"] for event in events[:-1])
    assert pieces > 4, "arguments stream as they come"
    assert all(event["choices"][0]["delta"] for event in events[:-2]), "no empty chunks"


async def test_calls_that_may_not_be_parallel_end_with_the_first(stack: Stack) -> None:
    stack.worker.say(f"{CALL}\n{CALL}\n{CALL}")
    reply = await stack.chat(tools=TOOLS, parallel_tool_calls=False)
    assert len(reply["choices"][0]["message"]["tool_calls"]) == 1
    assert reply["choices"][0]["finish_reason"] == "tool_calls"
    await stack.idle()


async def test_a_malformed_call_is_text(stack: Stack) -> None:
    text = '<tool_call>\n{"name": "read_file", "arguments": {"path" </tool_call>'
    stack.worker.say(text)
    choice = (await stack.chat(tools=TOOLS))["choices"][0]
    assert choice["message"]["content"] == text
    assert "tool_calls" not in choice["message"]
    assert choice["finish_reason"] == "stop"


async def test_tags_are_text_without_tools(stack: Stack) -> None:
    stack.worker.say(CALL)
    assert (await stack.chat())["choices"][0]["message"]["content"] == CALL
    assert (await stack.chat(tools=TOOLS, tool_choice="none"))["choices"][0]["message"]["content"] == CALL
    await stack.chat(tools=TOOLS)
    assert [submit.tools for submit in stack.worker.submits] == [False, False, True], "a hint for eviction"


async def test_tool_round_trip_reaches_the_template(stack: Stack) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "read"}, {"type": "text", "text": "it"}]},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "read_file", "arguments": '{"path": "é"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "the text"},
    ]
    status, _ = await stack.post("/v1/chat/completions", {"messages": messages, "tools": TOOLS})
    assert status == 200
    prompt = stack.worker.tokenizer.decode(unpack_ids(stack.worker.submits[0].token_ids), skip_special_tokens=False)
    assert "# Tools\n" + json.dumps(TOOLS[0]) in prompt
    assert "<|im_start|>user\nread\nit<|im_end|>" in prompt
    assert '<think>\nhm\n</think>\n\n<tool_call>\n{"name": "read_file", "arguments": {"path": "é"}}' in prompt
    assert "<|im_start|>tool\nthe text<|im_end|>" in prompt


async def test_reasoning(stack: Stack) -> None:
    stack.worker.say(f"<think>\nwell, well\n</think>\n\nYes.\n{CALL}")
    reply = await stack.chat(tools=TOOLS)
    message = reply["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("well, well", "Yes.")
    assert len(message["tool_calls"]) == 1
    events = await stack.chat_stream(tools=TOOLS)
    assert (joined(events, "reasoning_content"), joined(events, "content")) == ("well, well", "Yes.")


async def test_tags_that_are_special_tokens(start_stack: StartStack, tmp_path: Any) -> None:
    """They would be skipped as special tokens; the parsers need them, and what they leave is text."""
    stack = await start_stack(folder=write_model_folder(tmp_path, special_tags=True))
    stack.worker.say(f"<think>hm</think>Yes.{CALL}")
    message = (await stack.chat(tools=TOOLS))["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm", "Yes.")
    assert len(message["tool_calls"]) == 1
    status, reply = await stack.post("/v1/completions", {"prompt": "x"})
    assert (status, "<think>" in reply["choices"][0]["text"]) == (200, False)


async def test_reasoning_that_the_prompt_opened(stack: Stack) -> None:
    stack.worker.say("well\n</think>\n\nYes")
    reply = await stack.chat(chat_template_kwargs={"enable_thinking": True})
    message = reply["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("well", "Yes")

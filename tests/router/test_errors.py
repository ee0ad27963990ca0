"""Bad input: a 4xx in OpenAI's shape that names the parameter; never a 500, never a hang."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from mock_worker import Script, write_model_folder
from router_stack import Stack, StartStack, until

from tokenrelay.base.errors import InvalidRequest, Unavailable
from tokenrelay.proto import worker_pb2
from tokenrelay.services.chassis.channel import encode_error
from tokenrelay.services.router.validate import check_range

USER = {"role": "user", "content": "Hi"}
CHAT = "/v1/chat/completions"


async def post_raw(stack: Stack, path: str, body: bytes, **headers: str) -> tuple[int, Any, Any]:
    async with stack.http.post(stack.url + path, data=body, headers=headers) as response:
        return response.status, await response.json(), response.headers


def check_shape(status: int, reply: Any) -> dict[str, Any]:
    assert set(reply) == {"error"}, reply
    error = reply["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert 400 <= status < 500 or status in (503, 504), (status, reply)
    return error


def nested(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = {"x": value}
    return value


BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": [{"content": "Hi"}]}, "messages[0].role"),
    ({"messages": [USER, {"role": "wizard", "content": "Hi"}]}, "messages[1].role"),
    ({"messages": [{"role": 1, "content": "Hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "messages[0].content[0].text"),
    ({"messages": [{"role": "user", "content": [1]}]}, "messages[0].content[0]"),
    ({"messages": [{**USER, "tool_calls": [{"function": {"name": "f"}}]}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function"),
    ({"model": 5}, "model"),
    ({"n": 0}, "n"),
    ({"n": 10_000}, "n"),
    ({"n": 1.5}, "n"),
    ({"n": True}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.5}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 10**12}, "top_k"),
    ({"min_p": 1.5}, "min_p"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"seed": 1 << 64}, "seed"),
    ({"seed": "x"}, "seed"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ({"logit_bias": {"5": None}}, "logit_bias"),
    ({"logit_bias": {str(n): 0 for n in range(2000)}}, "logit_bias"),
    ({"stop": ["x"] * 10_000}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop[1]"),
    ({"stop": "x" * 10_000}, "stop"),
    ({"stop": [5]}, "stop[0]"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": [10**9]}, "stop_token_ids"),
    ({"stop_token_ids": [1] * 1000}, "stop_token_ids"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": 3}, "logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": "yes"}, "stream"),
    ({"priority": 10**6}, "priority"),
    ({"thinking_token_budget": -1}, "thinking_token_budget"),
    ({"tps_floor": 0}, "tps_floor"),
    ({"tps_floor": 2000}, "tps_floor"),
    ({"tps_floor": 70.5}, "tps_floor"),
    ({"expected_output_tokens": 0}, "expected_output_tokens"),
    ({"expected_output_tokens": 1 << 40}, "expected_output_tokens"),
    ({"cache_salt": "x" * 1000}, "cache_salt"),
    ({"tools": [{}]}, "tools[0]"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 5}}]}, "tools[0].function.parameters"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": nested(100)}}]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"x": 10**400}}}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    ({"tool_choice": "sometimes"}, "tool_choice"),
    ({"response_format": 5}, "response_format"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"guided_json": 5}, "guided_json"),
    ({"best_of": 3}, "best_of"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ({"functions": []}, "functions"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"chat_template": "x"}, "chat_template"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
    ({"chat_template_kwargs": nested(100)}, "chat_template_kwargs"),
    ({"messages": [{"role": "user", "content": "word " * 5000}]}, "messages"),
]  # fmt: skip


async def test_every_bad_parameter_is_named(stack: Stack) -> None:
    """One stack for all of them: none may leave anything behind either."""
    for fields, param in BAD:
        status, reply = await stack.post(CHAT, {"messages": [USER], **fields})
        error = check_shape(status, reply)
        assert (status, error["param"]) == (400, param), (str(fields)[:200], reply)
        assert error["type"] == "invalid_request_error"
    assert stack.worker.submits == []
    await stack.chat()


def test_numbers_that_are_none() -> None:
    for value in (float("nan"), float("inf"), float("-inf")):
        with pytest.raises(InvalidRequest, match="temperature"):
            check_range("temperature", value, (-float("inf"), float("inf")))


async def test_null_means_not_given(stack: Stack) -> None:
    names = [
        "temperature",
        "n",
        "stop",
        "tools",
        "logit_bias",
        "stream_options",
        "response_format",
        "max_tokens",
        "seed",
    ]
    await stack.chat(**dict.fromkeys(names))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"{'messages': []}",
        b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "\\udc00 x"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": Infinity}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": ' + b"9" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 5000 + b"}",
        b'{"messages": ' + b"[" * 100_000,
        b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b', "messages": []}',
        b'{"messages": [{"role": "user", "content": "x"}], "tools": ' + b'[{"a":' * 5000 + b"1" + b"}]" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": "x"}]} trailing',
        b"\x00" * 100,
    ],
)
async def test_bodies_that_are_no_request(stack: Stack, body: bytes) -> None:
    paths = (
        [CHAT]
        if b'"temperature"' in body or b'"seed"' in body
        else [CHAT, "/v1/completions", "/tokenize", "/detokenize"]
    )
    for path in paths:
        status, reply, _ = await post_raw(stack, path, body)
        check_shape(status, reply)
        assert status == 400


async def test_duplicate_keys_take_the_last(stack: Stack) -> None:
    body = b'{"messages": [], "messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "max_tokens": 2}'
    status, _, _ = await post_raw(stack, CHAT, body)
    assert status == 200
    assert stack.worker.submits[0].tokens_max == 2


async def test_body_over_the_limit(start_stack: StartStack) -> None:
    stack = await start_stack(body_bytes_max=10_000)
    status, reply, _ = await post_raw(
        stack, CHAT, json.dumps({"messages": [{"role": "user", "content": "x" * 20_000}]}).encode()
    )
    assert (status, check_shape(status, reply)["code"]) == (413, "body_too_large")
    assert (await stack.chat())["choices"]


async def test_compressed_garbage(stack: Stack) -> None:
    status, reply, _ = await post_raw(stack, CHAT, b"not gzip at all", **{"Content-Encoding": "gzip"})
    check_shape(status, reply)
    assert status == 400


async def test_unknown_model(stack: Stack) -> None:
    for path, body in (
        (CHAT, {"messages": [USER]}),
        ("/v1/completions", {"prompt": "x"}),
        ("/tokenize", {"prompt": "x"}),
    ):
        status, reply = await stack.post(path, {**body, "model": "gpt-9"})
        error = check_shape(status, reply)
        assert (status, error["param"], error["code"]) == (404, "model", "model_not_found")


async def test_unknown_paths_and_methods(stack: Stack) -> None:
    async with stack.http.get(stack.url + "/v2/nothing") as response:
        assert response.status == 404
        check_shape(404, await response.json())
    async with stack.http.get(stack.url + CHAT) as response:
        assert response.status == 405
        check_shape(405, await response.json())
        assert response.headers["Allow"] == "POST"


BAD_COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": []}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": [[]]}, "prompt[0]"),
    ({"prompt": [1, "x"]}, "prompt[0]"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [10**9]}, "prompt"),
    ({"prompt": [1.5]}, "prompt[0]"),
    ({"prompt": [1] * 4096}, "prompt"),
    ({"prompt": ["x"] * 1000}, "prompt"),
    ({"prompt": ["x"] * 100, "n": 100}, "n"),
    ({"prompt": "x", "echo": True}, "echo"),
    ({"prompt": "x", "suffix": "y"}, "suffix"),
    ({"prompt": "x", "logprobs": 100}, "logprobs"),
    ({"prompt": "x" * 2_000_000}, "prompt"),
    ({}, "prompt"),
]


async def test_bad_completions(stack: Stack) -> None:
    for fields, param in BAD_COMPLETIONS:
        status, reply = await stack.post("/v1/completions", fields)
        error = check_shape(status, reply)
        assert (status, error["param"]) == (400, param), (str(fields)[:200], reply)
    assert stack.worker.submits == []


async def test_prompt_longer_than_the_context(stack: Stack) -> None:
    status, reply = await stack.post(CHAT, {"messages": [{"role": "user", "content": "word " * 5000}]})
    assert (status, reply["error"]["code"], reply["error"]["param"]) == (400, "context_length_exceeded", "messages")
    status, reply = await stack.post("/v1/completions", {"prompt": [["5"], 5]})
    assert status == 400
    status, reply = await stack.post("/v1/completions", {"prompt": [5] * 5000})
    assert (status, reply["error"]["code"], reply["error"]["param"]) == (400, "context_length_exceeded", "prompt")


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('only users here') }}", "only users here"),
        ("{% for %}", "does not compile"),
        ("{{ messages[5].content }}", "failed"),
        ("{{ messages.nothing() }}", "failed"),
        ("{{ 1 / 0 }}", "failed"),
        ("{{ ''.__class__.__mro__ }}", "failed"),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'x' * 99999 }}{% endfor %}{% endfor %}",
            "renders more",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "failed"),
        (None, "no chat template"),
    ],
)
async def test_broken_chat_templates(start_stack: StartStack, tmp_path: Path, template: str | None, says: str) -> None:
    stack = await start_stack(folder=write_model_folder(tmp_path, chat_template=template))
    status, reply = await stack.post(CHAT, {"messages": [USER]})
    error = check_shape(status, reply)
    assert (status, error["param"]) == (400, "messages")
    assert says in error["message"]
    status, _ = await stack.post("/v1/completions", {"prompt": "still works"})
    assert status == 200


# -- what workers refuse ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("refuse", "status", "param"),
    [
        (worker_pb2.REJECT_QUEUE_FULL, 429, None),
        (worker_pb2.REJECT_PROMPT_TOO_LONG, 400, "messages"),
        (worker_pb2.REJECT_DRAINING, 503, None),
        (worker_pb2.REJECT_INVALID, 400, None),
        (worker_pb2.REJECT_DUPLICATE_ID, 503, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_refusals(stack: Stack, refuse: int, status: int, param: str | None, stream: bool) -> None:
    hanging = Script([], finish=worker_pb2.FINISH_NONE)
    refused = Script([], refuse=refuse, error="overloaded: no room")
    stack.worker.host.answer = lambda submit: refused if submit.choice == 1 else hanging
    body = json.dumps({"messages": [USER], "n": 2, "stream": stream}).encode()
    got, reply, headers = await post_raw(stack, CHAT, body)
    error = check_shape(got, reply)
    assert (got, error["param"]) == (status, param)
    assert ("Retry-After" in headers) is (status in (429, 503))
    await stack.idle()  # the other choice was aborted


@pytest.mark.parametrize("stream", [False, True])
async def test_a_worker_that_fails_a_sequence(stack: Stack, stream: bool) -> None:
    error = encode_error(Unavailable("the engine fell over"))
    stack.worker.host.answer = lambda submit: Script([], finish=worker_pb2.FINISH_ERROR, error=error)
    status, reply = await stack.post(CHAT, {"messages": [USER], "stream": stream})
    assert status == 503
    assert check_shape(status, reply)["message"] == "the engine fell over"


async def test_more_requests_than_the_router_takes(start_stack: StartStack) -> None:
    stack = await start_stack(requests_open_max=2)
    stack.worker.host.answer = lambda submit: Script(stack.worker.ids("x"), finish=worker_pb2.FINISH_NONE)
    hanging = [asyncio.create_task(stack.chat()) for _ in range(2)]
    await until(lambda: len(stack.worker.submits) == 2)
    status, reply, headers = await post_raw(stack, CHAT, json.dumps({"messages": [USER]}).encode())
    check_shape(status, reply)
    assert (status, headers["Retry-After"]) == (429, "1")
    for task in hanging:
        task.cancel()
    await asyncio.gather(*hanging, return_exceptions=True)
    await stack.idle()
    stack.worker.say("again")
    await stack.chat()

"""Ends: clients that leave or read slowly, workers that die and come back, deadlines, drains."""

from __future__ import annotations

import asyncio
import gc
import json
from typing import Any

import pytest
from mock_worker import Script, write_model_folder
from router_stack import Stack, StartStack, read_stream, until

from tokenrelay.base.deadlines import Deadline
from tokenrelay.proto import worker_pb2
from tokenrelay.services.router.generation import Choice, Run
from tokenrelay.services.router.text import ChatText

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "Hi"}]}
LONG = 200_000
MANY_BYTES = {"logprobs": True, "top_logprobs": 20}  # about 2 kB a token, so that the system's buffers fill soon


def endless(stack: Stack, text: str = "x", per_step: int = 1, step_s: float = 0.002) -> None:
    """Sequences that would run for a long time."""
    token_ids = stack.worker.ids(text) * LONG
    stack.worker.host.step_s = step_s
    stack.worker.host.answer = lambda submit: Script(token_ids, per_step=per_step)


def hanging(stack: Stack) -> None:
    """Sequences that wait for ever."""
    stack.worker.host.answer = lambda submit: Script([], finish=worker_pb2.FINISH_NONE)


# -- clients ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("answers", [endless, hanging])
async def test_a_client_that_leaves_is_aborted_at_once(stack: Stack, stream: bool, answers: Any) -> None:
    answers(stack)
    _, writer = await stack.connect({**BODY, "stream": stream, "n": 2, "max_tokens": 4000})
    await until(lambda: stack.worker.running == 2)
    writer.close()
    await until(lambda: stack.worker.running == 0)  # of themselves they would run for 8 s, or for ever
    assert len(stack.worker.host.aborted) == 2
    assert stack.service.state.metrics.aborts["disconnect"] == 2
    assert stack.service.state.metrics.requests[CHAT, 499] == 1
    await until(lambda: stack.service.state.metrics.requests_open == 0)
    assert stack.service.state.metrics.streams_open == 0


async def test_a_client_that_leaves_between_requests_disturbs_nobody(stack: Stack) -> None:
    for _ in range(3):
        reader, writer = await stack.connect(BODY)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()
    await stack.chat()


async def test_http_1_0(stack: Stack) -> None:
    """No chunks there: the end of the connection is the end of the stream."""
    reader, writer = await stack.connect({**BODY, "stream": True}, version="1.0")
    reply = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    head, _, body = reply.partition(b"\r\n\r\n")
    assert b"chunked" not in head.lower()
    assert body.endswith(b"data: [DONE]\n\n")
    assert body.startswith(b"data: {")


async def test_a_slow_reader_gets_merged_deltas(start_stack: StartStack) -> None:
    """While nobody reads, deltas pile up merged; all text arrives in the end, in fewer events."""
    stack = await start_stack(send_buffer_bytes=1024, slow_reader_bytes_max=64 << 20)
    text = "some words of text that fill the buffers of the system " * 40
    token_ids = stack.worker.ids(text)
    stack.worker.host.answer = lambda submit: Script(token_ids, per_step=4, finish=worker_pb2.FINISH_LENGTH)
    stack.worker.host.step_s = 0.002
    reader, writer = await stack.connect({**BODY, "stream": True, "n": 8, **MANY_BYTES})
    await until(lambda: len(stack.worker.submits) == 8)
    await until(lambda: stack.worker.running == 0, timeout_s=30)
    reply = await _read_until_done(reader)
    writer.close()
    events = [json.loads(line[6:]) for line in reply.split(b"\n") if line.startswith(b"data: {")]
    assert not [event for event in events if "error" in event]
    texts = [""] * 8
    for event in events:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == [text] * 8
    assert len(events) < 8 * len(token_ids) / 4 / 1.5, "merged while nobody read"


async def _read_until_done(reader: asyncio.StreamReader) -> bytes:
    """A chunked reply, put together."""
    pieces = []
    while (line := await asyncio.wait_for(reader.readline(), 30)) != b"\r\n":
        assert line, "the connection ended before the headers did"
    while size := int(await asyncio.wait_for(reader.readline(), 30), 16):
        pieces.append(await reader.readexactly(size))
        await reader.readexactly(2)
    return b"".join(pieces)


async def test_a_reader_that_is_too_slow_is_aborted(start_stack: StartStack) -> None:
    stack = await start_stack(send_buffer_bytes=1024, slow_reader_bytes_max=20_000, send_timeout_s=0.3)
    endless(stack, "some words of text ", per_step=10)
    _, writer = await stack.connect({**BODY, "stream": True, "n": 8, **MANY_BYTES})
    await until(lambda: stack.service.state.metrics.aborts["slow_reader"] > 0, timeout_s=30)
    await until(lambda: stack.worker.running == 0)
    assert len(stack.worker.host.aborted) == 8, "none of them ran to its end for a client that does not read"
    await until(lambda: stack.service.state.metrics.requests_open == 0)
    writer.close()


async def test_waiting_streams_send_headers_and_comments(start_stack: StartStack) -> None:
    stack = await start_stack(headers_after_s=0.02, ping_every_s=0.02)
    hanging(stack)
    async with stack.http.post(stack.url + CHAT, json={**BODY, "stream": True}) as response:
        assert response.status == 200
        assert await response.content.readuntil(b"\n\n") == b": waiting\n\n"
        assert await response.content.readuntil(b"\n\n") == b": waiting\n\n"
        assert stack.service.state.metrics.streams_open == 1
    await stack.idle()
    await until(lambda: stack.service.state.metrics.streams_open == 0)


async def test_a_finished_request_leaves_no_cycles(stack: Stack) -> None:
    """Requests free themselves: memory does not wait for the collector."""
    await stack.chat()
    await stack.chat_stream()
    gc.collect()
    gc.disable()
    try:
        await stack.chat()
        await stack.chat_stream(n=2)
        await stack.chat(stop="wor")
        await stack.idle()
        await asyncio.sleep(0.01)
        kept = [type(one) for one in gc.get_objects() if isinstance(one, Run | Choice)]
        assert kept in ([], [Choice]), "the worker client remembers whom it called last, and no more"
    finally:
        gc.enable()


async def test_an_output_that_cannot_be_handled_ends_its_request(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect of our own must not leave a client waiting for ever."""
    monkeypatch.setattr(ChatText, "feed", lambda self, text, delta: 1 / 0)
    for stream in (False, True):
        status, reply = await asyncio.wait_for(stack.post(CHAT, {**BODY, "stream": stream}), 5)
        assert (status, reply["error"]["code"]) == (500, "internal_error")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_has_a_deadline(start_stack: StartStack, stream: bool) -> None:
    stack = await start_stack(request_timeout_s=1.0, headers_after_s=5.0)
    hanging(stack)
    status, reply = await stack.post(CHAT, {**BODY, "stream": stream})
    assert (status, reply["error"]["code"]) == (504, "deadline_exceeded")
    assert 0 < stack.worker.submits[0].deadline_left_ms <= 1000
    await stack.idle()


# -- workers ----------------------------------------------------------------------------------------------------------
async def test_a_dead_worker_ends_every_open_request_once(stack: Stack) -> None:
    endless(stack)
    unary = [asyncio.create_task(stack.post(CHAT, BODY)) for _ in range(3)]
    streams = [asyncio.create_task(stack.stream(CHAT, BODY)) for _ in range(3)]
    await until(lambda: stack.service.state.metrics.streams_open == 3)
    await stack.worker.stop()
    for status, reply in await asyncio.wait_for(asyncio.gather(*unary), 5):
        assert (status, reply["error"]["code"]) == (503, "unavailable")
    for events in await asyncio.wait_for(asyncio.gather(*streams), 5):
        assert [event for event in events if "error" in event] == events[-1:], "one error, the last event"
        assert "[DONE]" not in events
        assert events[-1]["error"]["code"] == "unavailable"
    await until(lambda: not stack.service.pool.usable)
    async with stack.http.get(stack.url + "/ready") as response:
        assert response.status == 503
    async with stack.http.get(stack.url + "/health") as response:
        assert response.status == 200
    status, _ = await stack.post(CHAT, BODY)
    assert status == 503


async def test_a_worker_that_comes_back_is_used_again(stack: Stack) -> None:
    await stack.worker.stop()
    await until(lambda: not stack.service.pool.usable)
    await stack.worker.start()
    await until(lambda: bool(stack.service.pool.usable))
    await stack.chat()


async def test_a_router_starts_without_a_worker(start_stack: StartStack) -> None:
    stack = await start_stack(worker_runs=False)
    for path in ("/ready", "/v1/models"):
        async with stack.http.get(stack.url + path) as response:
            assert response.status == 503
            assert "Retry-After" in response.headers
    status, _ = await stack.post(CHAT, BODY)
    assert status == 503
    await stack.worker.start()
    await until(lambda: bool(stack.service.pool.usable))
    await stack.chat()


async def test_a_folder_without_a_tokenizer_is_named(start_stack: StartStack, tmp_path: Any) -> None:
    stack = await start_stack(worker_runs=False, model_dir=str(tmp_path))
    await stack.worker.start()
    await until(lambda: str(tmp_path) in stack.service.pool.why_not())
    status, reply = await stack.post(CHAT, BODY)
    assert status == 503
    assert "tokenizer.json is missing" in reply["error"]["message"]
    write_model_folder(tmp_path)
    await until(lambda: bool(stack.service.pool.usable), timeout_s=20)
    await stack.chat()


# -- drain ------------------------------------------------------------------------------------------------------------
async def test_drain_finishes_what_is_open_and_refuses_what_is_new(stack: Stack) -> None:
    text = "The quick brown fox jumps over the lazy dog"
    stack.worker.say(text)
    stack.worker.host.step_s = 0.01
    async with stack.http.post(stack.url + CHAT, json={**BODY, "stream": True}) as response:
        drain = asyncio.create_task(stack.service.drain())
        await until(lambda: stack.service.state.draining)
        async with stack.http.get(stack.url + "/ready") as ready:
            assert ready.status == 503
        assert (await stack.post(CHAT, BODY))[0] == 503
        assert not drain.done()
        events = await read_stream(response)
    assert events[-1] == "[DONE]"
    await asyncio.wait_for(drain, 5)


async def test_a_drain_is_bounded(stack: Stack) -> None:
    hanging(stack)
    request = asyncio.create_task(stack.post(CHAT, BODY))
    await until(lambda: stack.worker.running == 1)
    await asyncio.wait_for(stack.service.state.drain(Deadline.after(0.05)), 5)
    status, reply = await request
    assert (status, reply["error"]["code"]) == (503, "unavailable")
    await stack.idle()


async def test_64_streams_a_third_of_them_aborted(stack: Stack) -> None:
    """The others complete, each with exactly one end, and nothing stays open."""
    text = "The quick brown fox jumps over the lazy dog, and reads the file notes.txt."
    stack.worker.say(text)
    stack.worker.host.step_s = 0.002

    async def one(number: int) -> list[Any] | None:
        async with stack.http.post(stack.url + CHAT, json={**BODY, "stream": True}) as response:
            if number % 3 == 0:
                await response.content.readuntil(b"\n\n")
                response.close()
                return None
            return await read_stream(response)

    for events in await asyncio.gather(*(one(number) for number in range(64))):
        if events is not None:
            assert events.count("[DONE]") == 1
            chunks = [event["choices"][0] for event in events[:-1]]
            assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == text
            assert sum(chunk["finish_reason"] is not None for chunk in chunks) == 1
    await stack.idle()
    await until(lambda: stack.service.state.metrics.requests_open == 0)

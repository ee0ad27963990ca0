"""A real worker process: a real model behind a real Unix socket; its life, its deaths, its books."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from transformers import AutoModelForCausalLM
from worker_process import Stream, WorkerProcess, connect, submit_message

from tokenrelay.base.errors import DeadlineExceeded, InvalidRequest, Unavailable
from tokenrelay.base.status import StatusPipe, parse_status
from tokenrelay.cli import worker as worker_module
from tokenrelay.proto import worker_pb2, worker_pb2_grpc
from tokenrelay.runtime import engine as engine_module
from tokenrelay.runtime.integrity import Books
from tokenrelay.services.chassis.channel import channel_options, decode_error
from tokenrelay.services.chassis.client import ClientOptions, WorkerClient


def prompt_of(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 384) for _ in range(length)]


def transformers_greedy(checkpoint: Path, prompt: list[int], tokens: int) -> list[int]:
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return output[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


async def quiet(client: Any) -> worker_pb2.Stats:
    """Counters once nothing runs."""
    for _ in range(500):
        stats: worker_pb2.Stats = await client.get_stats()
        if not (stats.blocks_active or stats.sequences_running or stats.sequences_waiting):
            return stats
        await asyncio.sleep(0.02)
    raise AssertionError(f"never quiet: {stats}")


async def test_it_serves_what_transformers_generates(shared_worker: WorkerProcess, checkpoint: Path) -> None:
    client = await connect(shared_worker)
    reply = client.handshake
    assert reply is not None and reply.role == "colocated" and reply.model_name == "tiny-deepseek"
    assert (reply.block_tokens, reply.blocks, reply.slots, reply.vocab_size) == (16, 200, 16, 384)
    assert len(reply.model_identity) == 16 and reply.dtype == "float32" and reply.context_tokens == 3200
    prompts = [prompt_of(seed, length) for seed, length in ((1, 5), (2, 40), (3, 17))]
    streams = [Stream() for _ in prompts]
    for prompt, stream in zip(prompts, streams, strict=True):
        client.submit(submit_message(prompt, 24), stream)
    for prompt, stream in zip(prompts, streams, strict=True):
        assert (await stream.ended()).finish == worker_pb2.FINISH_LENGTH
        assert stream.token_ids == transformers_greedy(checkpoint, prompt, 24)
    before, again = await quiet(client), Stream()
    client.submit(submit_message(prompts[1], 4), again)
    await again.ended()
    assert max(output.cached_tokens for output in again.outputs) == 39, "all but the last token"
    stats = await quiet(client)
    assert stats.blocks_free + stats.blocks_cached == 200
    assert stats.prompt_tokens == before.prompt_tokens + 40 and stats.cached_tokens == before.cached_tokens + 39
    await client.close()


async def test_sampling_fields_reach_the_engine(shared_worker: WorkerProcess) -> None:
    client = await connect(shared_worker)
    prompt = prompt_of(4, 20)

    async def run(**fields: Any) -> Stream:
        stream, message = Stream(), submit_message(prompt, 12, **fields)
        client.submit(message, stream)
        await stream.ended()
        return stream

    def warm(**fields: Any) -> worker_pb2.Sampling:
        return worker_pb2.Sampling(temperature=1.0, ignore_eos=True, **fields)

    first = await run(sampling=warm(logprobs=3), seed=2**63 + 5)
    assert first.token_ids == (await run(sampling=warm(), seed=2**63 + 5)).token_ids
    assert first.token_ids != (await run(sampling=warm(), seed=2**63 + 6)).token_ids
    assert first.token_ids != (await run(sampling=warm(), seed=2**63 + 5, choice=1)).token_ids
    entries = [entry for output in first.outputs for entry in output.logprobs]
    assert len(entries) == 12 and all(len(entry.top_token_ids) == 2 and entry.logprob <= 0 for entry in entries)
    greedy = await run()
    stopped = await run(sampling=worker_pb2.Sampling(stop_token_ids=[greedy.token_ids[3]], ignore_eos=True))
    end = greedy.token_ids.index(greedy.token_ids[3])
    assert stopped.token_ids == greedy.token_ids[: end + 1]
    assert stopped.terminals[0].finish == worker_pb2.FINISH_STOP
    bias = [worker_pb2.LogitBias(token_id=77, bias=100.0)]
    forced = await run(sampling=worker_pb2.Sampling(ignore_eos=True, logit_bias=bias))
    assert forced.token_ids == [77] * 12
    eos = [worker_pb2.LogitBias(token_id=2, bias=100.0)]
    ended = await run(sampling=worker_pb2.Sampling(logit_bias=eos))
    assert ended.token_ids == [2] and ended.terminals[0].finish == worker_pb2.FINISH_STOP
    held = await run(sampling=worker_pb2.Sampling(logit_bias=eos, tokens_min=3))
    assert 2 not in held.token_ids[:3] and held.token_ids[3] == 2
    await client.close()


async def test_what_cannot_be_run_is_refused_with_a_reason(shared_worker: WorkerProcess) -> None:
    client = await connect(shared_worker)
    cases = {
        "odd bytes": (worker_pb2.Submit(token_ids=b"abc", output_start=1, tokens_max=1), worker_pb2.REJECT_INVALID),
        "empty": (submit_message([], 4), worker_pb2.REJECT_INVALID),
        "outside": (submit_message([384], 4), worker_pb2.REJECT_INVALID),
        "too long": (submit_message(prompt_of(1, 3201), 4), worker_pb2.REJECT_PROMPT_TOO_LONG),
        "negative": (
            submit_message([5], 4, sampling=worker_pb2.Sampling(temperature=-1)),
            worker_pb2.REJECT_INVALID,
        ),
    }
    for name, (message, reason) in cases.items():
        stream = Stream()
        client.submit(message, stream)
        terminal = await stream.ended()
        assert (terminal.finish, terminal.reject_reason) == (worker_pb2.FINISH_REJECTED, reason), name
        assert isinstance(decode_error(terminal.error), InvalidRequest), name
    late = Stream()
    client.submit(submit_message(prompt_of(1, 10), 3000, deadline_left_ms=50), late)
    assert isinstance(decode_error((await late.ended()).error), DeadlineExceeded)
    await quiet(client)
    await client.close()


async def test_64_streams_a_third_aborted_at_random(shared_worker: WorkerProcess) -> None:
    rng, client = random.Random(5), await connect(shared_worker)
    shared, streams, aborted = prompt_of(9, 48), [], set()
    for n in range(64):
        stream = Stream()
        prompt = shared[: rng.choice((0, 16, 48))] + prompt_of(n, rng.randrange(1, 30))
        sequence = client.submit(submit_message(prompt, rng.randrange(4, 30)), stream)
        streams.append(stream)
        if n % 3 == 0:
            aborted.add(n)
            asyncio.get_running_loop().call_later(rng.random() * 0.2, client.abort, sequence)
    for n, stream in enumerate(streams):
        terminal = await stream.ended()
        allowed = {worker_pb2.FINISH_LENGTH} | ({worker_pb2.FINISH_ABORT} if n in aborted else set())
        assert terminal.finish in allowed
    stats = await quiet(client)
    assert stats.blocks_free + stats.blocks_cached == 200
    assert client.open_count == 0
    await client.close()


async def test_a_router_that_vanishes_leaves_nothing_behind(shared_worker: WorkerProcess) -> None:
    client, stream = await connect(shared_worker), Stream()
    aborts = (await client.get_stats()).aborts
    client.submit(submit_message(prompt_of(1, 10), 3000), stream)
    await stream.until(lambda: stream.token_ids)
    await client.close()
    assert stream.terminals[0].finish == worker_pb2.FINISH_ERROR
    other = await connect(shared_worker)
    stats = await quiet(other)
    assert stats.aborts == aborts + 1, (aborts, stats)
    await other.close()


async def test_kill_9_gives_every_request_one_terminal_error(worker: WorkerProcess) -> None:
    client, streams = await connect(worker), [Stream() for _ in range(20)]
    for n, stream in enumerate(streams):
        client.submit(submit_message(prompt_of(n, 10), 3000), stream)
    await streams[0].until(lambda: streams[0].token_ids)
    worker.signal(signal.SIGKILL)
    for stream in streams:
        terminal = await asyncio.wait_for(stream.ended(), 10)
        assert terminal.finish == worker_pb2.FINISH_ERROR
        assert isinstance(decode_error(terminal.error), Unavailable)
    assert not client.ready and client.last_error is not None
    await client.close()


async def test_sigterm_drains(worker: WorkerProcess) -> None:
    client, running = await connect(worker), Stream()
    client.submit(submit_message(prompt_of(1, 10), 400), running)
    await running.until(lambda: running.token_ids)
    worker.signal(signal.SIGTERM)
    for _ in range(100):
        late = Stream()
        try:
            client.submit(submit_message(prompt_of(2, 10), 1), late)
        except Unavailable:
            break
        terminal = await late.ended()
        if terminal.finish == worker_pb2.FINISH_REJECTED:
            assert terminal.reject_reason == worker_pb2.REJECT_DRAINING
            break
        await asyncio.sleep(0.01)
    else:
        raise AssertionError("it never refused")
    assert (await running.ended()).finish == worker_pb2.FINISH_LENGTH and len(running.token_ids) == 400
    assert await asyncio.to_thread(worker.wait) == 0
    assert worker.socket_is_gone()
    await client.close()


async def test_a_second_sigterm_stops_at_once(worker: WorkerProcess) -> None:
    client, streams = await connect(worker), [Stream() for _ in range(6)]
    for n, stream in enumerate(streams):  # of whose KV a third fits: seconds of work
        client.submit(submit_message(prompt_of(n, 10), 3000), stream)
    for stream in streams:
        await stream.until(lambda stream=stream: stream.token_ids)
    worker.signal(signal.SIGTERM)
    await asyncio.sleep(0.1)
    assert worker.process.poll() is None and any(not stream.terminals for stream in streams)
    worker.signal(signal.SIGTERM)
    assert await asyncio.to_thread(worker.process.wait, 30) == 128 + signal.SIGTERM
    finishes = [(await stream.ended()).finish for stream in streams]
    assert worker_pb2.FINISH_ERROR in finishes and set(finishes) <= {worker_pb2.FINISH_ERROR, worker_pb2.FINISH_LENGTH}
    await client.close()


async def test_a_router_that_does_not_read_slows_nobody(shared_worker: WorkerProcess) -> None:
    channel = grpc.aio.insecure_channel(f"unix:{shared_worker.socket}", options=channel_options())
    call = worker_pb2_grpc.WorkerStub(channel).Session()
    for n in range(8):
        message = submit_message(prompt_of(n, 5), 1500, sampling=worker_pb2.Sampling(ignore_eos=True, logprobs=21))
        message.id = n + 1
        await call.write(worker_pb2.Command(submit=message))
    client, stream = await connect(shared_worker), Stream()
    client.submit(submit_message(prompt_of(30, 10), 300), stream)
    assert (await stream.ended()).finish == worker_pb2.FINISH_LENGTH and len(stream.token_ids) == 300
    await client.close()
    await channel.close()
    other = await connect(shared_worker)
    await quiet(other)
    await other.close()


def start(*flags: str) -> tuple[int, dict[str, Any]]:
    """Run the worker's main in this process, where it is to fail: its exit code and last status."""
    logger, (read_fd, write_fd) = logging.getLogger("tokenrelay"), os.pipe()
    handlers, propagate = logger.handlers[:], logger.propagate
    try:
        code = worker_module.main(["--status-fd", str(write_fd), "--dtype", "float32", *flags])
    finally:
        logger.handlers[:], logger.propagate = handlers, propagate
        os.close(write_fd)
    with os.fdopen(read_fd, "rb") as lines:
        status = [parse_status(line) for line in lines]
    assert status and status[-1] is not None
    return code, status[-1]


def test_a_checkpoint_with_a_missing_file_ends_the_start_with_one_sentence(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    (broken / "model.safetensors").unlink()
    code, status = start("--model", str(broken), "--socket", str(tmp_path / "s"))
    assert code == 1 and status["event"] == "failed" and status["code"] == "checkpoint_error"
    assert "safetensors" in status["message"] and "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--slots", "0"), "worker.slots"),
        (("--block-tokens", "48"), "block_tokens"),
        (("--kv-memory", "lots", "--blocks", ""), "kv_memory"),
        (("--kv-memory", "1GiB", "--blocks", "10"), "give one of them"),
        (("--context-tokens", "4000", "--blocks", "10"), "context of 4000 tokens"),
        (("--slots", "64", "--step-tokens", "32"), "step_tokens"),
        (("--socket", "/nowhere/at/all"), "/nowhere/at"),
        (("--socket", ""), "worker.socket"),
    ],
)
def test_wrong_settings_are_named(checkpoint: Path, tmp_path: Path, flags: tuple[str, ...], expected: str) -> None:
    code, status = start("--model", str(checkpoint), "--socket", str(tmp_path / "s"), "--blocks", "300", *flags)
    assert code == 1 and status["event"] == "failed" and status["code"] == "config_error"
    assert expected in status["message"]


async def test_a_worker_whose_books_are_broken_answers_what_is_open_and_ends(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise AssertionError("block 3 has two owners")

    monkeypatch.setattr(engine_module, "Books", lambda _: Books(broken))
    flags = ["--model", str(checkpoint), "--socket", str(tmp_path / "s"), "--blocks", "200", "--dtype", "float32"]
    tables = worker_module.settings(worker_module._parser(None).parse_args([*flags, "--block-tokens", "16"]))
    options = worker_module.WorkerSettings(*(table.values for table in tables), incarnation="life-1")
    task = asyncio.create_task(worker_module.run(options, StatusPipe(None)))
    gone, stream = asyncio.Event(), Stream()
    patience = ClientOptions(backoff_max_s=0.2)
    client = WorkerClient(f"unix:{tmp_path}/s", options=patience, on_ready=lambda ready: ready or gone.set())
    await client.start()
    await client.wait_ready(60)
    client.submit(submit_message(prompt_of(1, 20), 5), stream)
    assert (await stream.ended()).finish == worker_pb2.FINISH_LENGTH
    code, at_once = await asyncio.wait_for(task, 30)
    assert (code, at_once) == (1, True), "the supervisor starts it anew"
    assert client.integrity_failures == 1
    await asyncio.wait_for(gone.wait(), 10)
    await client.close()

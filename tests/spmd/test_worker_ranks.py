"""A worker with `--tp 2`: what it generates is what one rank does, and a rank's death ends its requests and itself."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from spmd_processes import wait_gone
from worker_process import Stream, WorkerProcess, connect, submit_message


def children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return found


async def generate(worker: WorkerProcess, prompts: list[list[int]]) -> list[list[int]]:
    client = await connect(worker)
    streams = []
    for prompt in prompts:
        streams.append(Stream())
        client.submit(submit_message(prompt, 12), streams[-1])
    for stream in streams:
        assert not (await stream.ended()).error
    await client.close()
    return [stream.token_ids for stream in streams]


async def test_a_worker_of_two_ranks(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("v3-worker", "deepseek_v3", num_hidden_layers=3)
    source = random.Random(4)
    prompts = [[source.randrange(3, 384) for _ in range(length)] for length in (5, 40, 90)]
    flags = ("--slots", "8", "--blocks", "100")
    one = WorkerProcess(*flags, model=folder)
    two = WorkerProcess(*flags, "--tp", "2", model=folder)
    try:
        for worker in (one, two):
            assert worker.wait_settled()["event"] == "ready", worker.log.read_text()
        assert await generate(two, prompts) == await generate(one, prompts)
        followers = children(two.process.pid)
        assert len(followers) == 1 and children(one.process.pid) == []
        client = await connect(two)
        stream = Stream()
        client.submit(submit_message(prompts[0], 900), stream)
        await stream.until(lambda: len(stream.token_ids) > 3)
        killed = time.monotonic()
        os.kill(followers[0], signal.SIGKILL)
        terminal = await stream.ended()
        assert terminal.error and time.monotonic() - killed < 40, "before a collective's deadline"
        assert two.wait() == 1, "the supervisor starts it anew"
        wait_gone(followers)
    finally:
        one.close()
        two.close()


async def test_workers_whose_ranks_have_sequences_tokens_and_layers_of_their_own(
    checkpoint: Callable[..., Path],
) -> None:
    """Through the scheduler, with a shared prefix: some of it was computed on the other rank."""
    folder = checkpoint("v3-worker", "deepseek_v3", num_hidden_layers=3)
    source = random.Random(5)
    prefix = [source.randrange(3, 384) for _ in range(200)]
    first = [prefix, [*prefix[:70], 5, 6, 7], prefix[:40]]
    second = [prefix + [9] * 30, prefix[:130] + [8] * 9, [*prefix[:64], 7]]
    flags = ("--slots", "8", "--blocks", "100")
    expected, whole = None, 0
    meshes = ((), ("--dp", "2", "--experts", "send,spare:2", "--replace-steps", "7"), ("--pp", "2", "--cp", "2"))
    with contextlib.ExitStack() as stack:
        workers = [WorkerProcess(*flags, *mesh, model=folder) for mesh in meshes]
        for worker in workers:
            stack.callback(worker.close)
        for mesh, worker in zip(meshes, workers, strict=True):
            ready = worker.wait_settled()
            assert ready["event"] == "ready", worker.log.read_text()
            whole = whole or ready["kv_bytes"]
            layers, share = (2, 1) if "--pp" in mesh else (3, 2 if "--dp" in mesh else 1)
            assert ready["kv_bytes"] * share * 3 == whole * layers, "a rank has KV of its sequences and layers"
            found = [await generate(worker, first), await generate(worker, second)]
            expected = expected or found
            assert found == expected, mesh
            assert ("experts re-placed" in worker.log.read_text()) == ("--replace-steps" in mesh)

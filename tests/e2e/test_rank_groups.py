"""A rank dies in a worker of several: the group goes with it and is started anew, and what it did goes on elsewhere."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
from mesh_calls import counted, run, workers
from serving import Server, alive, until

TOKENS = 300


def groups(server: Server) -> dict[int, list[int]]:
    """The workers' processes, and of each those of its ranks."""
    found = {}
    for child in psutil.Process(server.own.process.pid).children():
        if "tokenrelay.cli.worker" in child.cmdline():
            ranks = [p.pid for p in child.children() if "tokenrelay.runtime.spmd.follower" in p.cmdline()]
            found[child.pid] = ranks
    return found


async def test_requests_of_a_group_that_lost_a_rank_move(
    start: Callable[..., Server], random_model: Path, tmp_path: Path
) -> None:
    config = tmp_path / "relay.toml"
    config.write_text("[supervisor]\nbackoff_first_s = 0.2\n[worker]\nthreads = 1\ndp = 2\n")
    given = (random_model, "--workers", 2, "--dtype", "float32", "--config", config)
    server = await asyncio.to_thread(lambda: start(*given, command="up"))
    wanted = await run(server, range(4), TOKENS)
    before = groups(server)
    assert [len(ranks) for ranks in before.values()] == [1, 1]
    begun = asyncio.Event()
    running = asyncio.ensure_future(run(server, range(4), TOKENS, begun))
    await asyncio.wait_for(begun.wait(), 60)
    lost = next(iter(before))
    os.kill(before[lost][0], signal.SIGKILL)
    assert await asyncio.wait_for(running, 180) == wanted, "nobody lost a token"
    assert counted(server, "moves_total").get('cause="lost"', 0) > 0, "nothing moved"
    await asyncio.to_thread(until, lambda: not any(map(alive, [lost, *before[lost]])))
    await asyncio.to_thread(until, lambda: all(one["ready"] for one in workers(server)), 120)
    after = groups(server)
    assert len(after) == 2 and lost not in after and all(len(ranks) == 1 for ranks in after.values())

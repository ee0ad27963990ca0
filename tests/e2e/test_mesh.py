"""`tokenrelay up`: several workers; deaths and rolling restarts that clients do not notice."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from load import Outcome, send, settled_pool
from serving import Server, until

PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def mesh(start: Callable[..., Server], random_model: Path) -> Server:
    return start(random_model, "--workers", 2, "--dtype", "float32", command="up")


def body(server: Server, number: int, **parameters: Any) -> dict[str, Any]:
    """Request `number`: greedy where it is even, sampled with a seed where it is odd."""
    sampling = {"temperature": 0} if number % 2 == 0 else {"temperature": 1.0, "seed": number}
    message = {"role": "user", "content": f"number {number} " * (1 + number % 5)}
    return {"model": server.model, "messages": [message], "ignore_eos": True, **sampling, **parameters}


async def run(server: Server, numbers: range, tokens: int) -> list[Outcome]:
    """All at once, streamed."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        usage = {"include_usage": True}
        bodies = [body(server, number, max_tokens=tokens, stream=True, stream_options=usage) for number in numbers]
        return await asyncio.gather(*(send(session, server.url, PATH, one) for one in bodies))


def workers(server: Server) -> list[dict[str, Any]]:
    with urllib.request.urlopen(f"{server.url}/workers", timeout=10) as response:
        found: list[dict[str, Any]] = json.load(response)["workers"]
        return found


def page(server: Server) -> str:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as response:
        return str(response.read(), "utf-8")


async def test_a_killed_worker_costs_nobody_a_token(mesh: Server, kill: Callable[[int], None]) -> None:
    wanted = [outcome.text for outcome in await run(mesh, range(12), 600)]
    assert len(set(wanted)) == 12
    running = asyncio.ensure_future(run(mesh, range(12), 600))
    await asyncio.to_thread(until, lambda: all(one["stats"]["sequences_running"] >= 1 for one in workers(mesh)))
    kill(int(mesh.facts["worker-1_pid"]))
    outcomes = await asyncio.wait_for(running, 120)
    assert [outcome.problems for outcome in outcomes] == [[]] * 12
    assert [outcome.kind for outcome in outcomes] == ["completed"] * 12, [outcome.error for outcome in outcomes]
    assert [outcome.text for outcome in outcomes] == wanted
    assert {outcome.completion_tokens for outcome in outcomes} == {600}
    assert 'tokenrelay_moves_total{cause="lost"}' in await asyncio.to_thread(page, mesh), "nothing moved"
    await asyncio.to_thread(until, lambda: all(one["ready"] for one in workers(mesh)))


async def test_a_rolling_restart_under_load_loses_no_request(mesh: Server) -> None:
    before = {one["incarnation"] for one in workers(mesh)}
    wanted = [outcome.text for outcome in await run(mesh, range(8), 24)]
    over, outcomes = asyncio.Event(), []

    async def client(number: int) -> None:
        # One connection a client, kept alive: the router is replaced behind it.
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as session:
            while not over.is_set():
                stream = bool(len(outcomes) % 2)
                outcomes.append(
                    (number, await send(session, mesh.url, PATH, body(mesh, number, max_tokens=24, stream=stream)))
                )

    clients = [asyncio.ensure_future(client(number)) for number in range(8)]
    await asyncio.sleep(0.5)
    mesh.signal(signal.SIGUSR2)

    def replaced() -> bool:
        try:
            now = workers(mesh)
        except OSError:
            return False
        return all(one["ready"] and one["incarnation"] not in before and one["connections"] == 1 for one in now)

    try:  # a new router has connected to each new worker once
        await asyncio.to_thread(until, replaced, 120)
        await asyncio.sleep(1.0)
    finally:
        over.set()
        await asyncio.wait_for(asyncio.gather(*clients), 120)
    assert len(outcomes) > 8
    bad = [
        (number, outcome.kind, outcome.status, outcome.error)
        for number, outcome in outcomes
        if outcome.kind != "completed"
    ]
    assert bad == []
    assert all(outcome.problems == [] for _, outcome in outcomes)
    assert all(outcome.text == wanted[number] for number, outcome in outcomes)


async def test_afterwards_no_block_is_held_and_it_drains(mesh: Server) -> None:
    async with aiohttp.ClientSession() as session:
        assert (await settled_pool(session, mesh.url)).active == 0
    pids = [value for name, value in mesh.facts.items() if name.endswith("_pid")]
    mesh.signal(signal.SIGTERM)
    assert mesh.end() == 0
    for pid in pids:
        with pytest.raises(OSError):
            os.kill(int(pid), 0)

"""`tokenrelay up`: several workers; deaths and rolling restarts that clients do not notice."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from load import send, settled_pool
from mesh_calls import PATH, body, page, run, workers
from serving import Server, until

TOKENS = 2400  # a second or more, so that a worker can be killed in the midst of it


@pytest.fixture(scope="module")
def mesh(start: Callable[..., Server], random_model: Path) -> Server:
    return start(random_model, "--workers", 2, "--dtype", "float32", command="up")


def moves(server: Server) -> float:
    """Sequences that went on at another worker because theirs was lost."""
    lines = [line for line in page(server).splitlines() if line.startswith('tokenrelay_moves_total{cause="lost"}')]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


async def test_a_killed_worker_costs_nobody_a_token(mesh: Server, kill: Callable[[int], None]) -> None:
    wanted = await run(mesh, range(8), TOKENS)
    assert len(set(wanted)) == 8
    begun = asyncio.Event()
    running = asyncio.ensure_future(run(mesh, range(8), TOKENS, begun))
    await asyncio.wait_for(begun.wait(), 60)
    kill(int(mesh.facts["worker-1_pid"]))
    assert await asyncio.wait_for(running, 120) == wanted
    assert 'tokenrelay_moves_total{cause="lost"}' in await asyncio.to_thread(page, mesh), "nothing moved"
    await asyncio.to_thread(until, lambda: all(one["ready"] for one in workers(mesh)))


async def test_a_killed_worker_while_a_grammar_holds(mesh: Server, kill: Callable[[int], None]) -> None:
    """The grammar goes on where the text stood: what comes after the move still fits what came before it."""
    schema = {"type": "array", "items": {"enum": ["left", "right", 7, None]}, "minItems": 900}
    form = {"type": "json_schema", "json_schema": {"name": "steps", "strict": True, "schema": schema}}
    ask: dict[str, Any] = {"response_format": form, "ignore_eos": False}
    wanted = await run(mesh, range(4), 800, **ask)
    begun = asyncio.Event()
    running = asyncio.ensure_future(run(mesh, range(4), 800, begun, **ask))
    await asyncio.wait_for(begun.wait(), 60)
    moved = moves(mesh)
    kill(int(mesh.facts["worker-2_pid"]))
    texts = await asyncio.wait_for(running, 120)
    assert texts == wanted and moves(mesh) > moved
    for text in texts:
        whole, _, _ = text.rpartition(",")
        assert set(json.loads(whole + "]")) <= {"left", "right", 7, None}
    await asyncio.to_thread(until, lambda: all(one["ready"] for one in workers(mesh)))


async def test_a_rolling_restart_under_load_loses_no_request(mesh: Server) -> None:
    before = {one["incarnation"] for one in workers(mesh)}
    wanted = await run(mesh, range(8), 24)
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

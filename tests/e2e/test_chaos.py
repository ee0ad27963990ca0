"""Random kills of every service but the router, seen by HTTP clients: right texts or clean errors, nothing left."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest
from chaos import Chaos
from load import settled_pool
from serving import Server, until
from test_mesh import workers

SUPERVISOR = "[supervisor]\nrestarts_max = 100\nbackoff_first_s = 0.2\nbackoff_max_s = 0.5\n"
WORKERS = {"tokenrelay.cli.worker": "worker", "tokenrelay.services.kvstore": "kvstore"}


@pytest.mark.parametrize(
    ("requests", "kills"), [(30, 4), pytest.param(200, 30, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
async def test_colocated_workers_under_random_kills(
    start: Callable[..., Server], random_model: Path, tmp_path: Path, requests: int, kills: int
) -> None:
    config = tmp_path / "relay.toml"
    config.write_text(SUPERVISOR)
    server = await asyncio.to_thread(
        lambda: start(random_model, "--workers", 3, "--dtype", "float32", "--config", config, command="up")
    )
    chaos = Chaos(server, requests, WORKERS)
    await chaos.run(requests, kills)
    tally = chaos.tally
    print(f"{tally.texts} texts, errors {dict(tally.errors)}, kills {dict(tally.kills)}")
    assert not tally.wrong, "\n".join(tally.wrong)
    assert tally.texts > requests / 2, tally
    await asyncio.to_thread(until, lambda: all(one["ready"] for one in workers(server)))
    async with aiohttp.ClientSession() as session:
        assert (await settled_pool(session, server.url)).active == 0

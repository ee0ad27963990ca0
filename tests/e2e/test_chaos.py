"""Random kills of every service but the router, seen by HTTP clients: right texts or clean errors, nothing left."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from load import metrics, settled_pool
from mesh_calls import workers
from random_kills import Chaos
from serving import Server, until

from tokenrelay.ledger.client import KvstoreClient

SUPERVISOR = "[supervisor]\nrestarts_max = 100\nbackoff_first_s = 0.2\nbackoff_max_s = 0.5\n"
FLEET = '[router]\nremote_prefill = "always"\n[fleet]\nlease_s = 2\nread_deadline_s = 4\n'
VICTIMS = {"tokenrelay.cli.worker": "worker", "tokenrelay.services.kvstore": "kvstore"}
LONG = pytest.param(200, 30, marks=[pytest.mark.slow, pytest.mark.timeout(900)])
StartServer = Callable[..., Server]


async def survive(start: StartServer, folder: Path, settings: str, model: Path, *arguments: Any, **size: int) -> Server:
    """Serve, kill, compare."""
    config = folder / "relay.toml"
    config.write_text(SUPERVISOR + settings)
    given = (model, *arguments, "--dtype", "float32", "--config", config)
    server = await asyncio.to_thread(lambda: start(*given, command="up"))
    chaos = Chaos(server, size["requests"], VICTIMS)
    await chaos.run(**size)
    tally = chaos.tally
    print(f"{tally.texts} texts, errors {dict(tally.errors)}, kills {dict(tally.kills)}")
    assert not tally.wrong, "\n".join(tally.wrong)
    assert tally.texts > size["requests"] / 2, tally
    await asyncio.to_thread(until, lambda: all(one["ready"] for one in workers(server)))
    async with aiohttp.ClientSession() as session:
        assert (await settled_pool(session, server.url)).active == 0
    return server


@pytest.mark.parametrize(("requests", "kills"), [(30, 3), LONG])
async def test_colocated_workers_under_random_kills(
    start: StartServer, random_model: Path, tmp_path: Path, requests: int, kills: int
) -> None:
    await survive(start, tmp_path, "", random_model, "--workers", 3, requests=requests, kills=kills)


@pytest.mark.parametrize(("requests", "kills"), [LONG])  # tests/faults/test_chaos.py has a short one with two legs
async def test_prefill_and_decode_workers_under_random_kills(
    start: StartServer, random_model: Path, tmp_path: Path, requests: int, kills: int
) -> None:
    roles = ("--prefill", 2, "--decode", 2)
    server = await survive(start, tmp_path, FLEET, random_model, *roles, requests=requests, kills=kills)
    async with aiohttp.ClientSession() as session:
        counted = await metrics(session, server.url)
    assert counted.get('tokenrelay_handovers_total{end="done"}', 0) > requests / 2, "they were to go over two legs"
    ledger = KvstoreClient([await asyncio.to_thread(address_of_kvstore, server)])
    ledger.start()
    async with asyncio.timeout(40):
        while (views := await ledger.views(None)) != []:  # noqa: ASYNC110 - the ledger's deadlines end them
            await asyncio.sleep(0.2)
    assert views == [], "a handle is left"
    await ledger.close()


def address_of_kvstore(server: Server) -> str:
    """As each of its lives was told."""
    found: list[str] = []

    def there() -> bool:
        for child in psutil.Process(server.own.process.pid).children():
            words = child.cmdline()
            if "tokenrelay.services.kvstore" in words:
                found.append(str(words[words.index("--address") + 1]))
        return bool(found)

    until(there)  # the last kill may have been its
    return found[0]

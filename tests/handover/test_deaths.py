"""A worker dies in the middle of a handover: one clean terminal error, and nothing is left in the ledger or a pool."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from fleet import Fleet

from tokenrelay.proto import worker_pb2

LONG = [random.Random(i).randrange(3, 380) for i in range(3900)]  # some 240 chunks: a few tenths of a second


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers enough that a prompt takes its time."""
    return make_checkpoint(tmp_path_factory.mktemp("fleet") / "deep", "deepseek_v3", num_hidden_layers=6)


@pytest.fixture
async def fleet(deep: Path) -> AsyncIterator[Fleet]:
    fleet = Fleet(deep, chunk_tokens=16, prefill_blocks=300, decode_blocks=300)
    try:
        await fleet.start()
        yield fleet
    finally:
        await fleet.close()


@pytest.mark.parametrize("victim", ["prefill", "decode"])
async def test_a_death_during_the_transfer(fleet: Fleet, victim: str) -> None:
    survivor = {"prefill": "decode", "decode": "prefill"}[victim]
    relayed = await fleet.relay(LONG, 12)
    await asyncio.sleep(0.05)  # chunks of the prompt are being computed and pulled
    fleet.workers[victim].signal(signal.SIGKILL)
    assert relayed.destination is not None
    stream = relayed.source if survivor == "prefill" else relayed.destination
    terminal = await stream.ended()
    assert terminal.finish in (worker_pb2.FINISH_ERROR, worker_pb2.FINISH_HANDOVER), fleet.logs(terminal)
    await fleet.settles(survivor)
    text = await fleet.alone(survivor, LONG[:100], 6)
    await fleet.clients[victim].close()
    await fleet.start_worker(victim)
    again = await fleet.relay(LONG[:100], 6)
    assert await fleet.finish(again) == text
    await fleet.settles("prefill", "decode")


@pytest.mark.parametrize("back", ["stays away", "comes back"])
async def test_the_kvstore_dies_during_the_transfer(fleet: Fleet, back: str) -> None:
    """Nobody waits out a handle's deadline (20 s here): the source gives up on the ledger after a second, both legs
    end, and the router can place the request anew. The pins go back when a kvstore is there again.
    """
    text = await fleet.alone("decode", LONG[:100], 6)
    relayed = await fleet.relay(LONG, 12)
    assert relayed.destination is not None
    destination = relayed.destination
    for _ in range(1000):
        if any(view.claimant for view in await fleet.open_handles()):
            break
        await asyncio.sleep(0.01)
    assert not relayed.source.terminals, "chunks of the prompt are being computed and pulled"
    fleet.kvstore.signal(signal.SIGKILL)
    if back == "comes back":
        await fleet.start_kvstore()
    assert (await relayed.source.ended()).finish in (worker_pb2.FINISH_HANDOVER, worker_pb2.FINISH_ERROR)
    computed_s = time.monotonic()
    ended = await destination.ended()
    assert time.monotonic() - computed_s < 8, "a silent ledger has a second, a call to it two"
    assert ended.finish == worker_pb2.FINISH_ERROR or back == "comes back"
    assert await fleet.alone("decode", LONG[:100], 6) == text
    assert await fleet.alone("prefill", LONG[:100], 6) == text
    if back == "stays away":
        await fleet.start_kvstore()
    await fleet.settles("prefill", "decode")


@pytest.mark.parametrize("leg", ["prefill", "decode"])
async def test_an_abort_during_the_transfer(fleet: Fleet, leg: str) -> None:
    relayed = await fleet.relay(LONG, 12)
    assert relayed.destination is not None
    stream = relayed.source if leg == "prefill" else relayed.destination
    fleet.clients[leg].abort(stream.id)  # type: ignore[attr-defined]
    assert (await stream.ended()).finish == worker_pb2.FINISH_ABORT
    if leg == "decode":
        fleet.clients["prefill"].withdraw(relayed.source.id)  # type: ignore[attr-defined]  # as a router does
    await relayed.source.ended()
    await relayed.destination.ended()
    await fleet.settles("prefill", "decode")

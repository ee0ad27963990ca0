"""Worker processes that are stopped for longer than every lease, and go on: they were fenced, and touch nothing."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint
from fleet import Fleet

from tokenrelay.ledger.api import Rejection
from tokenrelay.proto import worker_pb2
from tokenrelay.transfer.select import available

LONG = [random.Random(i).randrange(3, 380) for i in range(1500)]  # some 188 chunks
PAUSE_S = 4.0  # the members' lease is 1 s, a claim's deadline 2 s


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_checkpoint(tmp_path_factory.mktemp("faults") / "mla", "deepseek_v3")


@pytest.fixture
async def fleet(model: Path, request: pytest.FixtureRequest) -> AsyncIterator[Fleet]:
    fleet = Fleet(model, transport=getattr(request, "param", ""), chunk_tokens=8)
    try:
        await fleet.start()
        yield fleet
    finally:
        await fleet.close()


async def is_a_member(fleet: Fleet, role: str, life: str) -> bool:
    """Whether the ledger counts on this life."""
    members = await fleet.ledger.members()
    assert not isinstance(members, Rejection)
    return any((member.name, member.incarnation) == (role, life) for member in members)


async def life_of(fleet: Fleet, role: str) -> str:
    members = await fleet.ledger.members()
    assert not isinstance(members, Rejection)
    return next(member.incarnation for member in members if member.name == role)


KINDS = [pytest.param(kind, marks=[] if kind == "shared" else [pytest.mark.slow]) for kind in available()]


@pytest.mark.parametrize("fleet", KINDS, indirect=True)
async def test_a_destination_that_is_paused_for_longer_than_every_lease(fleet: Fleet) -> None:
    """Its claim ends by a fence, the source has its blocks again; awake, it is told that its life is over, and ends."""
    alone = await fleet.alone("prefill", LONG[:400], 6)
    life = await life_of(fleet, "decode")
    relayed = await fleet.relay(LONG, 12)
    assert relayed.destination is not None
    await asyncio.sleep(0.05)
    worker = fleet.workers["decode"]
    worker.signal(signal.SIGSTOP)
    await asyncio.sleep(PAUSE_S)
    assert not await is_a_member(fleet, "decode", life)
    await relayed.source.ended()
    await fleet.settles("prefill")
    assert await fleet.alone("prefill", LONG[:400], 6) == alone
    worker.signal(signal.SIGCONT)
    assert await asyncio.to_thread(worker.wait) != 0
    text = await fleet.alone("prefill", LONG, 12)
    said = relayed.token_ids  # no router listens to it any more; what it says is right all the same
    assert said == text[: len(said)]
    await fleet.clients["decode"].close()
    await fleet.start_worker("decode")
    again = await fleet.relay(LONG[:400], 6)
    assert await fleet.finish(again) == alone
    await fleet.settles("prefill", "decode")


async def test_a_source_that_is_paused_for_longer_than_every_lease(fleet: Fleet) -> None:
    """The destination ends its leg when the ledger says so, and has its blocks again; the source, awake, ends."""
    life = await life_of(fleet, "prefill")
    relayed = await fleet.relay(LONG, 12)
    assert relayed.destination is not None
    await asyncio.sleep(0.05)
    worker = fleet.workers["prefill"]
    worker.signal(signal.SIGSTOP)
    terminal = await relayed.destination.ended()
    assert terminal.finish == worker_pb2.FINISH_ERROR, terminal
    assert not relayed.destination.token_ids
    await fleet.settles("decode")
    await asyncio.sleep(PAUSE_S / 2)
    assert not await is_a_member(fleet, "prefill", life)
    worker.signal(signal.SIGCONT)
    assert await asyncio.to_thread(worker.wait) != 0
    assert "life" in worker.log.read_text()
    await fleet.clients["prefill"].close()
    await fleet.start_worker("prefill")
    again = await fleet.relay(LONG[:400], 6)
    assert await fleet.finish(again) == await fleet.alone("decode", LONG[:400], 6)
    await fleet.settles("prefill", "decode")

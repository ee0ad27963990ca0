"""Requests while workers and the kvstore are killed and paused at random: right texts or clean errors, nothing left."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from chaos import Chaos, ChaosFleet
from checkpoints import make_checkpoint


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[ChaosFleet]:
    torch.set_num_threads(1)
    fleet = ChaosFleet(
        make_checkpoint(tmp_path / "mla", "deepseek_v3"), chunk_tokens=64, prefill_blocks=400, decode_blocks=400
    )
    try:
        await fleet.start()
        yield fleet
    finally:
        await fleet.close()


@pytest.mark.parametrize(
    ("requests", "kills"), [(30, 2), pytest.param(200, 20, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
async def test_two_legs_under_random_kills(fleet: ChaosFleet, requests: int, kills: int) -> None:
    chaos = Chaos(fleet, seed=requests)
    await chaos.run(requests, kills)
    tally = chaos.tally
    print(f"{tally.texts} texts, errors {dict(tally.errors)}, {dict(tally.kills)}")
    assert not tally.wrong, "\n".join(tally.wrong)
    assert tally.texts > requests / 2, tally
    assert sum(tally.kills.values()) >= kills

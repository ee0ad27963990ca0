"""A fleet of real processes on tiny random models: a kvstore, a prefill and a decode worker."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint
from fleet import Fleet


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("fleet")
    return {
        "mla": make_checkpoint(folder / "mla", "deepseek_v3"),
        "gqa": make_checkpoint(folder / "gqa", "qwen3"),
        "bundled": Path(__file__).parents[2] / "assets" / "tokenrelay-tiny",
    }


@pytest.fixture
async def fleet(checkpoints: dict[str, Path]) -> AsyncIterator[Fleet]:
    fleet = Fleet(checkpoints["mla"])
    try:
        await fleet.start()
        yield fleet
    finally:
        await fleet.close()

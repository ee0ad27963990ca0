"""A real worker process on a tiny random model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint
from worker_process import WorkerProcess


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_checkpoint(tmp_path_factory.mktemp("worker") / "tiny-deepseek", "deepseek_v3")


@pytest.fixture
def worker(checkpoint: Path) -> Iterator[WorkerProcess]:
    process = WorkerProcess("--slots", "16", "--blocks", "200", model=checkpoint)
    assert process.wait_settled()["event"] == "ready", process.log.read_text()
    yield process
    process.close()


@pytest.fixture(scope="module")
def shared_worker(checkpoint: Path) -> Iterator[WorkerProcess]:
    """For tests that do it no harm."""
    process = WorkerProcess("--slots", "16", "--blocks", "200", model=checkpoint)
    assert process.wait_settled()["event"] == "ready", process.log.read_text()
    yield process
    process.close()

"""A rank that dies or hangs: the step ends with one error in time, the group is gone, later steps are refused."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from paged import Paged
from spmd_processes import wait_gone

from tokenrelay.base.errors import Unavailable
from tokenrelay.runtime.placement import Mesh
from tokenrelay.runtime.spmd.ranks import Ranks


@pytest.mark.parametrize(("how", "said"), [(signal.SIGKILL, "SIGKILL"), (signal.SIGSTOP, "the ranks failed")])
def test_a_rank_that_ends_or_hangs_ends_the_group(
    checkpoint: Callable[..., Path], how: signal.Signals, said: str
) -> None:
    folder = checkpoint("qwen3-small", "qwen3")
    died = threading.Event()
    deaths: list[BaseException] = []

    def on_death(error: BaseException) -> None:
        deaths.append(error)
        died.set()

    with Ranks(2, step_max_s=8, on_death=on_death) as ranks:
        model = ranks.load(folder, Mesh(tp=2), dtype=torch.float32, block_tokens=16)
        model.allocate(16)
        paged = Paged(model, blocks=16)
        row = paged.add([5, 6, 7, 8, 9])
        assert torch.isfinite(paged.step({row: 3})[row]).all()
        os.kill(ranks.pids[0], how)
        if how == signal.SIGKILL:
            assert died.wait(60), "nobody noticed while the engine was idle"
        started = time.monotonic()
        with pytest.raises(Unavailable, match=said):
            paged.step({row: 1})
        assert time.monotonic() - started < 30
        wait_gone(ranks.pids)
        with pytest.raises(Unavailable):
            paged.step({row: 1})
        assert died.wait(60) and len(deaths) == 1, "told once"


def test_a_rank_that_cannot_load_is_one_error(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """The folder is only there for the leader, as on a host that lacks the weights."""
    folder = checkpoint("qwen3-small", "qwen3")
    with Ranks(2, step_max_s=5) as ranks:
        original = ranks._send

        def misdirect(followers: object, kind: bytes, payload: bytes) -> None:
            original(followers, kind, payload.replace(str(folder).encode(), str(tmp_path / "none").encode()))  # type: ignore[arg-type]

        ranks._send = misdirect  # type: ignore[assignment, method-assign]
        with pytest.raises(Unavailable, match=r"rank 1 does not fit rank 0: .* does not exist"):
            ranks.load(folder, Mesh(tp=2), dtype=torch.float32)
        wait_gone(ranks.pids)

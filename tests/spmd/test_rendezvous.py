"""Ranks that come from elsewhere, as torchrun starts them on another host: they meet, compute, and end together."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_cases import relative_error
from paged import Paged

from tokenrelay.base.errors import ConfigError, Unavailable
from tokenrelay.runtime.placement import Mesh
from tokenrelay.runtime.spmd.followers import Rendezvous
from tokenrelay.runtime.spmd.ranks import Ranks
from tokenrelay.runtime.weights.loader import load_model


def start(rank: int, port: int, key: str = "open sesame") -> subprocess.Popen[bytes]:
    environment = {"RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen(
        [sys.executable, "-Pm", "tokenrelay.runtime.spmd.remote"],
        env={**os.environ, **environment, "TOKENRELAY_RENDEZVOUS_KEY": key},
        stderr=subprocess.PIPE,
    )


def test_a_rank_of_another_host(checkpoint: Callable[..., Path]) -> None:
    """Rank 1 is a child, rank 2 and 3 come by themselves; rank 3 dies in the end."""
    folder = checkpoint("v3-small", "deepseek_v3")
    tokens = list(range(5, 60))

    def answer(model: object) -> torch.Tensor:
        paged = Paged(model, blocks=16)
        row = paged.add(tokens)
        paged.step({row: 40})
        return paged.step({row: 15})[row]

    expected = answer(load_model(folder, dtype=torch.float32, block_tokens=16))
    rendezvous = Rendezvous("127.0.0.1:0", "open sesame")
    remotes = [start(3, rendezvous.port, "abracadabra"), start(2, rendezvous.port), start(3, rendezvous.port)]
    try:
        with Ranks(4, step_max_s=5, rendezvous=rendezvous, local=2, join_max_s=60) as ranks:
            assert len(ranks.pids) == 1
            model = ranks.load(folder, Mesh(dp=2, tp=2), dtype=torch.float32, block_tokens=16)
            model.allocate(16)
            assert relative_error(answer(model), expected) <= 1e-5
            assert remotes[0].wait(60) == 1, "another key"
            assert remotes[0].stderr is not None and b"its key is another one" in remotes[0].stderr.read()
            remotes[2].kill()
            end = time.monotonic() + 10
            while time.monotonic() < end:
                try:
                    answer(model)
                except Unavailable:
                    break
            with pytest.raises(
                Unavailable, match=r"rank 3 died \(its connection from 127\.0\.0\.1 ended\)|ranks failed"
            ):
                answer(model)
        remotes[1].wait(60)  # nobody leads it any more
    finally:
        for remote in remotes:
            remote.kill()
            remote.wait()


def test_ranks_that_do_not_come_are_named() -> None:
    rendezvous = Rendezvous("127.0.0.1:0", "")
    with pytest.raises(Unavailable, match=r"ranks 1, 2 did not come to 127\.0\.0\.1:\d+"):
        Ranks(3, rendezvous=rendezvous, local=1, join_max_s=0.3)


def test_what_is_no_address() -> None:
    for address in ("29500", "host:", ":1", "127.0.0.1:x"):
        with pytest.raises(ConfigError, match="expected host:port"):
            Rendezvous(address, "")
    with pytest.raises(ConfigError, match="cannot listen"):
        Rendezvous("192.0.2.1:1", "")


@pytest.mark.parametrize("missing", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_launcher_that_says_too_little(missing: str) -> None:
    environment = {"RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    del environment[missing]
    done = subprocess.run(
        [sys.executable, "-c", "from tokenrelay.runtime.spmd.config import RankEnvironment as R; R.read()"],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert f"ConfigError: {missing} is" in done.stderr

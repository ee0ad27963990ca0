"""Ranks that come from elsewhere, as torchrun starts them on another host: they meet, compute, and end together."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from model_cases import relative_error
from paged import Paged

from tokenrelay.base.errors import ConfigError, Unavailable
from tokenrelay.runtime.placement import Mesh
from tokenrelay.runtime.spmd.config import RankEnvironment
from tokenrelay.runtime.spmd.followers import Rendezvous
from tokenrelay.runtime.spmd.ranks import Ranks
from tokenrelay.runtime.spmd.remote import join
from tokenrelay.runtime.weights.loader import load_model


def start(rank: int, port: int, key: str = "open sesame") -> subprocess.Popen[bytes]:
    environment = {"RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen(
        [sys.executable, "-Pm", "tokenrelay.runtime.spmd.remote"],
        env={**os.environ, **environment, "TOKENRELAY_RENDEZVOUS_KEY": key},
        stderr=subprocess.PIPE,
    )


def refusal(remote: subprocess.Popen[bytes]) -> str:
    """Its last words; it ends with code 1 once it was refused."""
    _, said = remote.communicate(timeout=120)
    assert remote.returncode == 1, said
    return said.decode()


def test_a_rank_of_another_host(checkpoint: Callable[..., Path]) -> None:
    """Rank 1 is a child, rank 2 and 3 come by themselves; rank 3 dies in the end.

    Strangers are told so whenever they come: before the ranks are together, and after.
    """
    folder = checkpoint("v3-small", "deepseek_v3")
    tokens = list(range(5, 60))

    def answer(model: object) -> torch.Tensor:
        paged = Paged(model, blocks=16)
        row = paged.add(tokens)
        paged.step({row: 40})
        return paged.step({row: 15})[row]

    expected = answer(load_model(folder, dtype=torch.float32, block_tokens=16))
    rendezvous = Rendezvous("127.0.0.1:0", "open sesame")
    early = start(3, rendezvous.port, "abracadabra")
    remotes: list[subprocess.Popen[bytes]] = []
    late: list[subprocess.Popen[bytes]] = []

    def come() -> None:
        """The right ones only when the wrong one is gone: with all its ranks the leader is through with waiting."""
        early.wait()
        remotes.extend(start(rank, rendezvous.port) for rank in (2, 3))

    coming = threading.Thread(target=come)
    coming.start()
    try:
        with Ranks(4, step_max_s=10, rendezvous=rendezvous, local=2, join_max_s=120) as ranks:
            assert "its key is another one" in refusal(early)
            late[:] = [start(3, rendezvous.port, "abracadabra"), start(9, rendezvous.port)]
            assert len(ranks.pids) == 1
            model = ranks.load(folder, Mesh(dp=2, tp=2), dtype=torch.float32, block_tokens=16)
            model.allocate(16)
            assert relative_error(answer(model), expected) <= 1e-5
            for stranger in late:
                assert "is not awaited here" in refusal(stranger)
            remotes[1].kill()
            end = time.monotonic() + 60
            while time.monotonic() < end:
                try:
                    answer(model)
                except Unavailable:
                    break
            with pytest.raises(
                Unavailable, match=r"rank 3 died \(its connection from 127\.0\.0\.1 ended\)|ranks failed"
            ):
                answer(model)
        remotes[0].wait(60)  # nobody leads it any more
    finally:
        coming.join(60)
        for remote in (early, *remotes, *late):
            remote.kill()
            remote.wait()


def test_a_rank_that_comes_again_waits_for_the_next_leader() -> None:
    """Its launcher started it anew before the leader's was."""
    rendezvous = Rendezvous("127.0.0.1:0", "k")
    settings = RankEnvironment(1, "127.0.0.1", rendezvous.port, "k")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(join, settings, 30)
        assert len(rendezvous.meet({1}, {"port": 1}, 30)) == 1
        first.result()[0].close()
        again = pool.submit(join, settings, 30)
        with pytest.raises(TimeoutError):
            again.result(1.5)  # told to come later, and it does
        rendezvous.close()
        successor = Rendezvous(f"127.0.0.1:{rendezvous.port}", "k")
        assert len(successor.meet({1}, {"port": 2}, 30)) == 1
        connection, welcome = again.result(30)
        assert welcome["port"] == 2
        connection.close()
        successor.close()


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

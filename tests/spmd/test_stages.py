"""What overlaps: pipeline stages, each on another micro-batch; collectives, with what does not need them."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from model_cases import relative_error
from paged import Paged

from tokenrelay.runtime.placement import Mesh
from tokenrelay.runtime.spmd.comm import Comm
from tokenrelay.runtime.spmd.rank_model import RankModel, compile_programs
from tokenrelay.runtime.weights.loader import load_model

WAIT_S = 60.0


def in_threads(folder: Path, mesh: Mesh, *, overlapped: bool = False) -> list[RankModel]:
    """The ranks of a mesh, as threads of this process: they meet in gloo like processes do."""
    store = dist.HashStore()

    def make(rank: int) -> RankModel:
        model = load_model(folder, dtype=torch.float32, block_tokens=16, mesh=mesh, rank=rank)
        comm = Comm(store, "t", mesh, rank, WAIT_S)
        return RankModel(model, compile_programs(model.architecture, mesh), comm, rank, overlapped=overlapped)

    with ThreadPoolExecutor(mesh.ranks) as pool:
        return list(pool.map(make, range(mesh.ranks)))


def answer(model: Any) -> torch.Tensor:
    """Logits of every token of a prompt, in two steps."""
    paged = Paged(model, blocks=16, seed=1)
    row = paged.add(list(range(5, 42)))
    with torch.inference_mode():
        return torch.cat([paged.step({row: n}, every=True)[row] for n in (32, 5)])


class Follower:
    """A rank whose logits have no meaning."""

    def __init__(self, rank: RankModel) -> None:
        self.config, self._rank = rank.config, rank

    def __call__(self, ids: torch.Tensor, batch: Any, caches: list[torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        self._rank(ids, batch, caches, rows)
        return torch.zeros(len(rows), self.config.vocab_size)


def on_all(ranks: list[RankModel]) -> torch.Tensor:
    """What the first one answers."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        found = pool.submit(answer, ranks[0])
        others = [pool.submit(answer, Follower(rank)) for rank in ranks[1:]]
        for other in others:
            other.result(WAIT_S)
        return found.result(WAIT_S)


def test_a_stage_goes_on_while_the_next_one_computes(checkpoint: Callable[..., Path]) -> None:
    """Each may begin micro-batch i only when the one before has begun micro-batch i + 1: all overlap, or none ends."""
    folder = checkpoint("v3-engine", "deepseek_v3", num_hidden_layers=3)
    ranks = in_threads(folder, Mesh(pp=3))
    began = [[threading.Event() for _ in range(5)] for _ in ranks]
    met: list[tuple[int, int]] = []

    def watch(stage: int, rank: RankModel) -> None:
        rank.micro_tokens_min = 8
        count = itertools.count()
        for line in (rank._few, rank._many):

            def run(*given: Any, inner: Callable[..., Any] = line.run) -> Any:
                if (part := next(count)) >= 4:  # the second step is small, and stays whole
                    return inner(*given)
                began[stage][part].set()
                if stage and part < 3:
                    assert began[stage - 1][part + 1].wait(WAIT_S / 2), "the stage before waits for this one"
                    met.append((stage, part))
                return inner(*given)

            line.run = run

    for stage, rank in enumerate(ranks):
        watch(stage, rank)

    expected = answer(load_model(folder, dtype=torch.float32, block_tokens=16))
    assert relative_error(on_all(ranks), expected) <= 1e-5
    assert sorted(met) == [(stage, part) for stage in (1, 2) for part in range(3)]


def test_collectives_are_waited_for_late(checkpoint: Callable[..., Path]) -> None:
    """As on GPUs: keys are gathered along cp while the queries are computed."""
    folder = checkpoint("v3-engine", "deepseek_v3", num_hidden_layers=3)
    ranks = in_threads(folder, Mesh(cp=2), overlapped=True)
    lines = ranks[1]._few.source.splitlines()
    waits = [i for i, line in enumerate(lines) if line.endswith("()")]
    assert len(waits) == 3, "one in each layer"
    for at in waits:
        name = lines[at].strip().partition(" ")[0]
        begun = max(i for i in range(at) if lines[i].strip().startswith(f"{name} = "))
        assert any("= f" in line for line in lines[begun + 1 : at]), "something is computed meanwhile"
    expected = answer(load_model(folder, dtype=torch.float32, block_tokens=16))
    assert relative_error(on_all(ranks), expected) <= 1e-5

"""Pipeline stages overlap: one computes a micro-batch while the next computes the one before."""

from __future__ import annotations

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


def stages_of(folder: Path, stages: int) -> list[RankModel]:
    """The ranks of Mesh(pp=stages), as threads of this process: they meet in gloo like processes do."""
    store, mesh = dist.HashStore(), Mesh(pp=stages)

    def make(rank: int) -> RankModel:
        model = load_model(folder, dtype=torch.float32, block_tokens=16, mesh=mesh, rank=rank)
        return RankModel(model, compile_programs(model.architecture, mesh), Comm(store, "t", mesh, rank, WAIT_S), rank)

    with ThreadPoolExecutor(stages) as pool:
        return list(pool.map(make, range(stages)))


def test_a_stage_goes_on_while_the_next_one_computes(checkpoint: Callable[..., Path]) -> None:
    """Each may begin micro-batch i only when the one before has begun micro-batch i + 1: all overlap, or none ends."""
    folder = checkpoint("v3-engine", "deepseek_v3", num_hidden_layers=3)
    ranks = stages_of(folder, 3)
    began = [[threading.Event() for _ in range(5)] for _ in ranks]
    met: list[tuple[int, int]] = []

    def watch(stage: int, rank: RankModel) -> None:
        rank.part_tokens_min = 8
        count = iter(range(4))
        for line in (rank._few, rank._many):

            def run(*given: Any, inner: Callable[..., Any] = line.run) -> Any:
                part = next(count)
                began[stage][part].set()
                if stage and part < 3:
                    assert began[stage - 1][part + 1].wait(WAIT_S / 2), "the stage before waits for this one"
                    met.append((stage, part))
                return inner(*given)

            line.run = run

    for stage, rank in enumerate(ranks):
        watch(stage, rank)

    def answer(model: Any) -> torch.Tensor:
        paged = Paged(model, blocks=16, seed=1)
        with torch.inference_mode():
            return paged.step({paged.add(list(range(5, 37))): 32}, every=True)[0]

    expected = answer(load_model(folder, dtype=torch.float32, block_tokens=16))
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(answer, rank) for rank in ranks]
        assert relative_error(answers[0].result(WAIT_S), expected) <= 1e-5
        for other in answers[1:]:
            other.exception(WAIT_S)  # logits of no meaning
    assert sorted(met) == [(stage, part) for stage in (1, 2) for part in range(3)]

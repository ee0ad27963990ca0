"""Deterministic mode on several ranks: logits have the same bits whatever the batch, the chunks or a cached prefix."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from paged import Paged

from tokenrelay.base.errors import ConfigError
from tokenrelay.cli.worker import _numerics
from tokenrelay.kernels import registry
from tokenrelay.runtime.layers.moe import ExpertSplit
from tokenrelay.runtime.placement import Mesh
from tokenrelay.runtime.spmd.load import kernel_choices, take_kernels
from tokenrelay.runtime.spmd.ranks import Ranks
from tokenrelay.services.decode.config import WorkerConfig

PROMPT = [(7 * i * i + 3) % 300 for i in range(150)]
OTHER = [(5 * i * i + 11) % 300 for i in range(150)]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("qwen3_moe", {"num_key_value_heads": 4, "moe_intermediate_size": 32}),
    "v3": ("deepseek_v3", {"num_hidden_layers": 3, "moe_intermediate_size": 32, "kv_lora_rank": 32}),
}


@pytest.fixture(autouse=True)
def mode() -> Iterator[None]:
    """On, for this file."""
    registry.deterministic()
    yield
    registry.deterministic(False)


@pytest.mark.parametrize(
    ("mesh", "experts"),
    [
        (Mesh(tp=4), ""),
        (Mesh(ep=4), ""),
        (Mesh(dp=4), "send"),
        (Mesh(dp=2, tp=2), "whole"),
        (Mesh(cp=2, tp=2), ""),
        (Mesh(pp=2, tp=2), ""),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", MODELS)
def test_the_same_bits_in_any_company(
    ranks: Ranks, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, name: str, mesh: Mesh, experts: str
) -> None:
    monkeypatch.setattr("tokenrelay.runtime.spmd.ranks.MICRO_TOKENS_MIN", 16)
    family, overrides = MODELS[name]
    folder = checkpoint(f"{name}-deterministic", family, **overrides)
    split = ExpertSplit.parse(experts)
    model = ranks.load(folder, mesh, dtype=torch.float32, block_tokens=16, experts=split)
    model.allocate(64)
    paged = Paged(model)
    truth = paged.step({paged.add(PROMPT): len(PROMPT)}, every=True)[0]
    paged = Paged(model)
    a, b = paged.add(PROMPT), paged.add(OTHER)
    done = 0
    for mine, other in ((17, 30), (1, 1), (64, 1), (1, 40), (60, 70), (3, 1), (1, 1), (1, 3), (2, 2)):
        found = paged.step({a: mine, b: other}, every=True)[a]
        assert torch.equal(found, truth[done : done + mine]), f"tokens {done} to {done + mine}"
        done += mine
    shared = paged.add(PROMPT, prefix_of=a, prefix_blocks=5)
    assert torch.equal(paged.step({shared: 70}, every=True)[shared], truth[80:])


def test_all_ranks_run_the_leaders_kernels() -> None:
    key = ("linear", "cpu", "float32", (("in_features", 64), ("out_features", 8)))
    registry.tuned({key: "ref/torch"})
    order = json.loads(json.dumps(kernel_choices()))
    registry.tuned({})
    registry.deterministic(False)
    take_kernels(order)
    try:
        assert registry.is_deterministic() and registry.tuned_choices() == {key: "ref/torch"}
    finally:
        registry.tuned({})


def test_widths_are_told_where_bits_count() -> None:
    """Sums of two ranks are other ones than those of one: a router moves no sequence between them."""
    one, two, cut = (_numerics("float32", WorkerConfig(**sizes)) for sizes in ({}, {"tp": 2}, {"cp": 2, "pp": 2}))
    assert one == cut and two == one + ";tp2"
    registry.deterministic(False)
    assert _numerics("float32", WorkerConfig(tp=2)) == _numerics("float32", WorkerConfig())


def test_replicas_that_take_turns_are_refused() -> None:
    with pytest.raises(ConfigError, match="deterministic and experts spare:N exclude each other"):
        WorkerConfig(dp=2, experts="send,spare:2", deterministic=True).check()
    WorkerConfig(dp=2, experts="send", deterministic=True).check()

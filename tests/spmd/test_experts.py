"""Experts by load: tables are whole and balanced, and logits stay those of one rank whatever is re-placed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import relative_error
from paged import Paged

from tokenrelay.base.errors import PlacementError
from tokenrelay.runtime.layers.moe import ExpertSplit
from tokenrelay.runtime.placement import Mesh
from tokenrelay.runtime.spmd.experts import NOBODY, ExpertPlaces, block_loads, initial_table, place_experts
from tokenrelay.runtime.spmd.ranks import Ranks
from tokenrelay.runtime.weights.loader import load_model


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 3), st.randoms(use_true_random=False))
def test_every_expert_is_somewhere_and_nothing_gets_worse(
    blocks: int, held: int, spare: int, source: random.Random
) -> None:
    loads = [source.choice([0, 1, 5, 100, 1000]) for _ in range(blocks * held)]
    before = initial_table(len(loads), blocks, held + spare)
    for _ in range(3):
        table = place_experts(loads, blocks, held + spare, before)
        assert [len(row) for row in table] == [held + spare] * blocks
        assert {e for row in table for e in row} - {NOBODY} == set(range(len(loads)))
        for row in table:
            named = [e for e in row if e != NOBODY]
            assert len(named) == len(set(named)), "once in a block"
        for old, new in zip(before, table, strict=True):
            assert all(a == b for a, b in zip(old, new, strict=True) if a != NOBODY and a in new), "who stays, stays"
        before = table
        loads = [load + source.randrange(50) for load in loads]


def test_a_busy_expert_is_computed_by_several() -> None:
    loads = [1000, 10, 10, 10, 10, 10, 10, 10]
    table = place_experts(loads, blocks=4, slots=3, before=initial_table(8, 4, 3))
    assert sum(0 in row for row in table) == 4
    assert max(block_loads(table, loads)) < 0.3 * max(block_loads(initial_table(8, 4, 3), loads))
    places = ExpertPlaces(table, 8)
    found = places.of(torch.zeros((8, 1), dtype=torch.int32)).flatten().tolist()
    assert sorted(place // 3 for place in found) == [0, 0, 1, 1, 2, 2, 3, 3], "in turn"


MESHES = [
    (Mesh(ep=2), "spare:1"),
    (Mesh(dp=2), "send,spare:2"),
    (Mesh(dp=2, tp=2), "send,whole,spare:1"),
    (Mesh(pp=2, ep=2), "spare:2"),
]


@pytest.mark.parametrize(("mesh", "words"), MESHES, ids=str)
@pytest.mark.parametrize("name", ["v3", "qwen3_moe"])
def test_replacing_between_steps_changes_no_logits(
    ranks: Ranks, checkpoint: Callable[..., Path], name: str, mesh: Mesh, words: str
) -> None:
    overrides: dict[str, Any] = {"num_key_value_heads": 4} if name == "qwen3_moe" else {}
    family = {"v3": "deepseek_v3", "qwen3_moe": "qwen3_moe"}[name]
    folder = checkpoint(f"{name}-experts", family, num_hidden_layers=3, **overrides)
    source = random.Random(2)
    tokens = [source.randrange(3, 384) for _ in range(120)]

    def run(model: Any, between: Callable[[], Any]) -> list[torch.Tensor]:
        paged = Paged(model, blocks=64, seed=3)
        a, b = paged.add(tokens), paged.add(tokens[::-1])
        found = []
        for lengths in ({a: 40, b: 30}, {a: 1, b: 1}, {a: 30, b: 7}, {b: 1}):
            logits = paged.step(lengths, every=True)
            found += [logits[row] for row in sorted(logits)]
            between()
        return found

    expected = run(load_model(folder, dtype=torch.float32, block_tokens=16), lambda: None)
    model = ranks.load(folder, mesh, dtype=torch.float32, block_tokens=16, experts=ExpertSplit.parse(words))
    model.allocate(64)
    moved: list[int] = []
    found = run(model, lambda: moved.append(model.replace_experts().moved))
    assert moved[0] > 0, "spare places were filled"
    for i, (logits, right) in enumerate(zip(found, expected, strict=True)):
        assert relative_error(logits, right) <= 1e-5, f"{mesh!r} row {i}"


def test_what_spare_places_need() -> None:
    with pytest.raises(PlacementError, match=r"written spare:N, N from 0 to 64, not 'spare:many'"):
        ExpertSplit.parse("spare:many")

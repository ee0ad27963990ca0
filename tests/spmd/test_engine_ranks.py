"""An engine on several ranks: drafts, a pool in parts, preemption. What is said is what one rank says."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from guesses import WIDTH, Guessing, oracle, repeating
from harness import Harness

from tokenrelay.base.errors import ConfigError
from tokenrelay.runtime.placement import Mesh
from tokenrelay.runtime.spmd.ranks import Ranks
from tokenrelay.runtime.weights.loader import load_model

MESHES = [Mesh(tp=2), Mesh(dp=2), Mesh(cp=2), Mesh(pp=2), Mesh(pp=2, dp=2)]


def led(ranks: Ranks, folder: Path, mesh: Mesh, **sizes: Any) -> Harness:
    model = ranks.load(folder, mesh, dtype=torch.float32, block_tokens=16)
    harness = Harness(model, **sizes)
    model.allocate(harness.built.pool.blocks)
    return harness


@pytest.fixture
def folder(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("v3-engine", "deepseek_v3", num_hidden_layers=3)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_drafts_change_nothing(ranks: Ranks, folder: Path, monkeypatch: pytest.MonkeyPatch, mesh: Mesh) -> None:
    monkeypatch.setattr("tokenrelay.runtime.spmd.ranks.MICRO_TOKENS_MIN", 2)  # drafts in several micro-batches
    prompts = [repeating(seed, 384, 40 + 9 * seed) for seed in range(4)]
    with Harness(load_model(folder, dtype=torch.float32, block_tokens=16)) as one:
        expected = one.run(*prompts, tokens_max=30)
    several = led(ranks, folder, mesh, draft_tokens=WIDTH)
    texts = {i + 1: prompt + text for i, (prompt, text) in enumerate(zip(prompts, expected, strict=True))}
    several.engine._drafter = Guessing(several, oracle(texts, right=3, wrong=2))
    with several:
        assert several.run(*prompts, tokens_max=30) == expected
        counts = several.engine.stats.drafts
        several.assert_quiet()
    assert counts.drafts > 20 and 30 < counts.accepted < counts.tokens


def test_each_part_of_the_pool_has_its_own_sequences(ranks: Ranks, folder: Path) -> None:
    """Two parts of eight blocks: no more than they hold is admitted to either, and some are preempted."""
    source = random.Random(8)
    prompts = [[source.randrange(3, 384) for _ in range(length)] for length in (60, 30, 61, 33, 62, 17)]
    with Harness(load_model(folder, dtype=torch.float32, block_tokens=16), context_tokens=128) as one:
        expected = one.run(*prompts, tokens_max=40)
        again = one.run(*[[*p, 9, 9] for p in prompts], tokens_max=5)
    with led(ranks, folder, Mesh(dp=2), blocks=16, context_tokens=128) as several:
        assert several.built.pool.own_blocks == 8
        assert several.run(*prompts, tokens_max=40) == expected
        assert several.run(*[[*p, 9, 9] for p in prompts], tokens_max=5) == again
        for n in range(3):  # a turn goes back to where its text is
            turn = several.submit([*prompts[n], 5, 6], 3)
            assert several.wait(turn)[0].token_ids == (first := several.run([*prompts[n], 5, 6], tokens_max=3)[0])
            assert first == several.run([*prompts[n], 5, 6], tokens_max=3)[0]
        counts = several.built.scheduler.counts()
        several.assert_quiet()
    assert counts.preemptions > 0 and counts.cached_tokens >= 2 * (48 + 16 + 48)


def test_a_pool_that_does_not_divide_is_refused(ranks: Ranks, folder: Path) -> None:
    with pytest.raises(ConfigError, match="--blocks is 17, and 2 ranks along dp divide them"):
        led(ranks, folder, Mesh(dp=2), blocks=17)
    with pytest.raises(ConfigError, match="a context of 128 tokens needs"):
        led(ranks, folder, Mesh(dp=2), blocks=14, context_tokens=128)

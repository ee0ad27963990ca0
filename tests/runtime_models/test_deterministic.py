"""Deterministic mode: logits are equal bit by bit whatever the batch, the chunks of a prompt or a cached prefix."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint
from paged import Paged

from tokenrelay.kernels import cpu, registry
from tokenrelay.runtime.models.decoder import Model
from tokenrelay.runtime.weights.loader import load_model
from tokenrelay.runtime.weights.pack import pack_model
from tokenrelay.runtime.weights.quantize import quantize_model

PROMPT = [(7 * i * i + 3) % 300 for i in range(180)]
OTHER = [(5 * i * i + 11) % 300 for i in range(150)]
# Ranks so small that prompts of tens of tokens are projected, were it not for the mode.
SMALL = {"kv_lora_rank": 32, "qk_nope_head_dim": 8, "v_head_dim": 8}
FAMILIES = {
    "qwen3": {},
    "qwen3_moe": {"moe_intermediate_size": 32},
    "deepseek_v2": {**SMALL, "moe_intermediate_size": 32},
    "deepseek_v3": {**SMALL, "moe_intermediate_size": 32},
}


@pytest.fixture(autouse=True)
def mode() -> Iterator[None]:
    """On, for this file."""
    registry.deterministic()
    yield
    registry.deterministic(False)


def make(folder: Path, family: str, dtype: torch.dtype, form: str) -> Model:
    model = load_model(make_checkpoint(folder, family, **FAMILIES[family]), dtype=dtype, block_tokens=16)
    if form == "int8":
        quantize_model(model, form)
    if form != "plain":
        pack_model(model)
        model.capture()
    return model


def whole(model: Model) -> torch.Tensor:
    """[180, vocab]: the prompt alone, in one step."""
    paged = Paged(model)
    return paged.step({paged.add(PROMPT): len(PROMPT)}, every=True)[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "form"), [("float32", "plain"), ("bfloat16", "packed"), ("bfloat16", "int8")])
def test_the_same_bits_in_any_company(tmp_path: Path, family: str, dtype: str, form: str) -> None:
    model = make(tmp_path / family, family, getattr(torch, dtype), form)
    truth = whole(model)
    paged = Paged(model)
    a, b = paged.add(PROMPT), paged.add(OTHER)
    done = 0
    for mine, other in ((17, 30), (1, 1), (64, 1), (1, 40), (90, 70), (3, 1), (1, 1), (1, 3), (2, 2)):
        found = paged.step({a: mine, b: other}, every=True)[a]
        assert torch.equal(found, truth[done : done + mine]), f"tokens {done} to {done + mine}"
        done += mine
    assert done == len(PROMPT)
    shared = paged.add(PROMPT, prefix_of=a, prefix_blocks=5)
    assert torch.equal(paged.step({shared: 100}, every=True)[shared], truth[80:])
    threads = cpu.threads()
    cpu.set_threads(3 - min(2, threads))
    try:
        assert torch.equal(whole(model), truth)
    finally:
        cpu.set_threads(threads)


def test_without_the_mode_a_prompt_of_latent_attention_is_not(tmp_path: Path) -> None:
    """Or this file would show nothing."""
    model = make(tmp_path / "m", "deepseek_v2", torch.float32, "plain")
    truth = whole(model)
    registry.deterministic(False)
    assert not torch.equal(whole(model), truth)

"""Models whose matrices are integers: near what they were, the same in any batch, another identity."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint
from paged import Paged

from tokenrelay.base.errors import ConfigError
from tokenrelay.runtime.layers.linear import Linear
from tokenrelay.runtime.layers.moe import Experts
from tokenrelay.runtime.weights.loader import load_model
from tokenrelay.runtime.weights.quantize import quantize_model, weight_bytes

FAMILIES = ["deepseek_v3", "qwen3", "qwen3_moe", "llama"]
PROMPT = [(7 * i * i + 3) % 300 for i in range(90)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("form", "error"), [("int8", 0.05), ("int4", 0.5), ("int4-32", 0.5), ("int4-128", 0.5)])
def test_logits_are_near(tmp_path: Path, family: str, form: str, error: float) -> None:
    folder = make_checkpoint(tmp_path / family, family)
    model = load_model(folder, dtype=torch.float32, block_tokens=16)
    exact = Paged(model)
    logits = exact.step({exact.add(PROMPT): len(PROMPT)}, every=True)[0]
    identity, before = model.config.identity, weight_bytes(model)
    steps: list[tuple[int, int]] = []
    quantize_model(model, form, lambda done, total: steps.append((done, total)))
    assert steps and steps[-1][0] == steps[-1][1] == len(steps)
    assert model.config.identity != identity and weight_bytes(model) < before
    assert not any(
        parameter.dim() == 2 and name.endswith("down.weight") for name, parameter in model.named_parameters()
    )
    paged = Paged(model)
    a = paged.add(PROMPT)
    found = paged.step({a: len(PROMPT)}, every=True)[a]
    # In the middle: random experts are nearly tied, and a token that goes to another one is anywhere.
    off = float(((found - logits).norm(dim=-1) / logits.norm(dim=-1)).median())
    assert 0 < off < error
    # Chunks and company change nothing but the last bits of attention.
    chunked = Paged(model)
    a = chunked.add(PROMPT)
    chunked.step({a: 50})
    b = chunked.add(PROMPT[5:40])
    assert torch.allclose(chunked.step({a: 40, b: 35})[a], found[-1], atol=2e-2 * float(found.abs().max()))


def test_the_memory_of_what_was_quantized_is_given_back(tmp_path: Path) -> None:
    """Modules look their parameters up in a faster place too, from where they go as well."""
    model = load_model(make_checkpoint(tmp_path / "m", "deepseek_v3"), dtype=torch.float32)
    held = [
        weakref.ref(parameter)
        for module in model.modules()
        if isinstance(module, Linear | Experts)
        for parameter in module.parameters(recurse=False)
    ]
    quantize_model(model, "int8")
    assert held and not any(one() is not None for one in held)


def test_what_cannot_be_quantized_is_refused(tmp_path: Path) -> None:
    model = load_model(make_checkpoint(tmp_path / "m", "qwen3"), dtype=torch.float32)
    with pytest.raises(ConfigError, match="weight_dtype is 'int3', expected auto, int8, int4"):
        quantize_model(model, "int3")
    model.cos_sin = model.cos_sin.to("meta")
    with pytest.raises(ConfigError, match="needs the CPU"):
        quantize_model(model, "int8")

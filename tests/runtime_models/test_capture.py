"""A captured model computes, bit by bit, what its modules compute one by one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint
from paged import Paged

from tokenrelay.kernels import registry
from tokenrelay.runtime.models.decoder import Model
from tokenrelay.runtime.weights.loader import load_model
from tokenrelay.runtime.weights.pack import pack_model
from tokenrelay.runtime.weights.quantize import quantize_model

PROMPT = [(7 * i * i + 3) % 300 for i in range(90)]


def logits_of(model: Model) -> list[torch.Tensor]:
    """A whole prompt, chunks in company, decodes, and a mixed step."""
    paged = Paged(model)
    a, b = paged.add(PROMPT), paged.add(PROMPT[5:40])
    found = [paged.step({a: 60}, every=True)[a]]
    for lengths in ({a: 28, b: 33}, {a: 1, b: 1}, {a: 1}):
        step = paged.step(lengths)
        found += [step[i] for i in lengths]
    return found


@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["plain", "packed", "int8", "int8 packed", "int4 packed"])
def test_bits_are_those_of_the_modules(tmp_path: Path, family: str, dtype: torch.dtype, form: str) -> None:
    model = load_model(make_checkpoint(tmp_path / family, family), dtype=dtype, block_tokens=16)
    if form.startswith("int"):
        quantize_model(model, form.split()[0])
    if form.endswith("packed"):
        pack_model(model)
    expected = logits_of(model)
    model.capture()
    assert model._capture is not None and model._capture.program() is not None
    for found, truth in zip(logits_of(model), expected, strict=True):
        assert torch.equal(found, truth)


def captured(tmp_path: Path, family: str = "llama") -> Model:
    model = load_model(make_checkpoint(tmp_path / family, family), dtype=torch.float32, block_tokens=16)
    model.capture()
    return model


def test_what_is_not_native_runs_module_by_module(tmp_path: Path) -> None:
    model = captured(tmp_path)
    native = logits_of(model)
    with registry.force("silu_mul", "ref/torch"):
        assert model._capture is not None and model._capture.program() is None
        assert torch.allclose(logits_of(model)[-1], native[-1], atol=1e-3)
    assert model._capture.program() is not None


def test_a_step_that_samples_nothing_writes_its_cache(tmp_path: Path) -> None:
    model = captured(tmp_path)
    paged, twin = Paged(model), Paged(model)
    for one in (paged, twin):
        one.add(PROMPT)
    token_ids, batch, _ = paged.batch({0: 40})
    assert model(token_ids, batch, paged.caches, torch.zeros(0, dtype=torch.int64)).shape == (0, 384)
    paged.rows[0].done = 40
    twin.step({0: 40})
    assert torch.equal(paged.step({0: 50})[0], twin.step({0: 50})[0])


def test_what_lies_outside_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = captured(tmp_path)
    paged = Paged(model)
    paged.add(PROMPT)
    token_ids, batch, _ = paged.batch({0: 40})
    rows = torch.tensor([39])
    for field, value, message in (
        ("positions", 4096, "position 4096 of token 7 is outside the table of 4096"),
        ("cache_slots", 64 * 16, "cache_slots\\[7\\] is 1024, the cache has 1024"),
    ):
        changed = getattr(batch, field).clone()
        changed[7] = value
        with pytest.raises(ValueError, match=message):
            model(token_ids, dataclasses.replace(batch, **{field: changed}), paged.caches, rows)
    with pytest.raises(ValueError, match=r"sample_rows\[0\] is 40, the step has 40 tokens"):
        model(token_ids, batch, paged.caches, rows + 1)
    assert all(cache.isnan().all() for cache in paged.caches)
    token_ids[3] = 384
    with pytest.raises(ValueError, match="token id 384 is not in the vocabulary of 384"):
        model(token_ids, batch, paged.caches, rows)

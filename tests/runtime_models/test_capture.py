"""A captured model computes, bit by bit, what its modules compute one by one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FAMILIES, make_checkpoint
from paged import Paged

from tokenrelay.kernels import registry
from tokenrelay.kernels.program import Program
from tokenrelay.runtime.models.decoder import Model
from tokenrelay.runtime.weights.loader import load_model
from tokenrelay.runtime.weights.pack import pack_model
from tokenrelay.runtime.weights.quantize import quantize_model

# Of the experts: once a width that packs, once one that does not.
WIDTHS: dict[str, dict[str, Any]] = {family: {} for family in FAMILIES} | {"deepseek_v3": {"moe_intermediate_size": 32}}
PROMPT = [(7 * i * i + 3) % 300 for i in range(90)]


STEPS = ({0: 27, 1: 20}, {0: 1, 1: 12}, {0: 1, 1: 1}, {0: 1})  # chunks in company, mixed, decodes
LATENT = ("deepseek_v2", "deepseek_v3")


def logits_of(model: Model) -> list[torch.Tensor]:
    """A whole prompt, chunks in company, decodes, and a mixed step."""
    paged = Paged(model)
    a = paged.add(PROMPT)
    paged.add(PROMPT[5:40])
    found = [paged.step({a: 60}, every=True)[a]]
    for lengths in STEPS:
        step = paged.step(lengths)
        found += [step[i] for i in lengths]
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["plain", "packed", "int8", "int8 packed", "int4 packed"])
def test_bits_are_those_of_the_modules(
    tmp_path: Path, family: str, dtype: torch.dtype, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(make_checkpoint(tmp_path / family, family, **WIDTHS[family]), dtype=dtype, block_tokens=16)
    if form.startswith("int"):
        quantize_model(model, form.split()[0])
    if form.endswith("packed"):
        pack_model(model)
    expected = logits_of(model)
    model.capture()
    assert model._capture is not None and model._capture.program() is not None
    runs = counted(monkeypatch)
    # The long chunk of latent attention is projected up, which torch does for plain matrices. Of the last layer, a
    # program computes the sampled tokens alone, and attends over latents for so few: other last bits, after which a
    # router may choose another expert for a token or two.
    projected = family in LATENT and model.layers[0].attention.core.packed is not None
    for step, (found, truth) in enumerate(zip(logits_of(model), expected, strict=True)):
        if step == 0 and projected:
            apart = (found - truth).abs().amax(1) / truth.abs().amax(1)
            assert float((apart < (0.04 if form.startswith("int") else 0.02)).float().mean()) > 0.9  # rounded inputs
        else:
            assert torch.equal(found, truth)
    assert len(runs) == len(STEPS) + (1 if projected or family not in LATENT else 0)


@pytest.mark.parametrize(
    ("family", "ops"),
    [
        ("qwen3", ("rms_norm", "add_rms_norm", "rotary", "gqa_decode", "gqa_prefill", "linear", "silu_mul")),
        ("qwen3_moe", ("moe", "moe_route", "gqa_decode")),
        ("deepseek_v3", ("mla_decode", "mla_prefill", "mla_absorb", "mla_expand", "rotary", "moe", "moe_route")),
    ],
)
def test_it_runs_the_kernels_that_are_chosen(tmp_path: Path, family: str, ops: tuple[str, ...]) -> None:
    """Another instruction set has other last bits, and the program follows each operation's choice."""
    model = load_model(make_checkpoint(tmp_path / family, family), dtype=torch.float32, block_tokens=16)
    usual = logits_of(model)
    for op in ops:
        with registry.force(op, "cpu/baseline"):
            model._capture = None
            expected = logits_of(model)
            model.capture()
            assert model.captured() is not None
            for found, truth in zip(logits_of(model), expected, strict=True):
                assert torch.equal(found, truth), op
    model._capture = None
    assert all(torch.equal(found, truth) for found, truth in zip(logits_of(model), usual, strict=True))


def counted(monkeypatch: pytest.MonkeyPatch, name: str = "run") -> list[int]:
    """The tokens of each step that a program will run from now on; `name`: of its method."""
    runs: list[int] = []
    run = getattr(Program, name)

    def counting(program: Program, token_ids: torch.Tensor, *others: Any) -> Any:
        runs.append(len(token_ids))
        return run(program, token_ids, *others)

    monkeypatch.setattr(Program, name, counting)
    return runs


@pytest.mark.parametrize("family", LATENT)
@pytest.mark.parametrize("form", ["plain", "packed", "int8 packed"])
def test_deterministic_latent_attention_is_captured_for_longer_chunks(
    tmp_path: Path, family: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.deterministic()
    try:
        model = load_model(make_checkpoint(tmp_path / family, family), dtype=torch.bfloat16, block_tokens=16)
        if form.startswith("int"):
            quantize_model(model, form.split()[0])
        if form.endswith("packed"):
            pack_model(model)
        expected = logits_of(model)
        model.capture()
        runs = counted(monkeypatch)
        for found, truth in zip(logits_of(model), expected, strict=True):
            assert torch.equal(found, truth)
        assert len(runs) == len(STEPS) + 1
    finally:
        registry.deterministic(False)


def test_a_step_with_drafted_rows_is_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of one sequence as rows of one token each: their bits are those of one after the other."""
    model = load_model(make_checkpoint(tmp_path / "m", "deepseek_v3"), dtype=torch.bfloat16, block_tokens=16)
    model.capture()
    paged, alone = Paged(model), Paged(model)
    for one in (paged, alone):
        one.add(PROMPT)
        one.step({0: 60})
    truth = [alone.step({0: 1})[0] for _ in range(3)]
    token_ids, batch, _ = paged.batch({0: 3})
    ones = torch.ones(3, dtype=torch.int32)
    drafted = dataclasses.replace(
        batch,
        slots=batch.slots.repeat(3),
        starts=torch.tensor([60, 61, 62], dtype=torch.int32),
        lengths=ones,
        offsets=torch.arange(4, dtype=torch.int32),
        decodes=3,
    )
    runs = counted(monkeypatch)
    assert torch.equal(model(token_ids, drafted, paged.caches, torch.arange(3)), torch.stack(truth))
    assert runs == [3]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["plain", "packed", "int4 packed"])
def test_what_a_prediction_layer_reads_has_the_same_bits(
    tmp_path: Path, family: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind every token of a step, up to what the head multiplies; a cache behind the model's is not touched."""
    model = load_model(make_checkpoint(tmp_path / family, family), dtype=torch.bfloat16, block_tokens=16)
    if form.startswith("int"):
        quantize_model(model, form.split()[0])
    if form.endswith("packed"):
        pack_model(model)

    def steps() -> list[torch.Tensor]:
        paged, found = Paged(model), []
        paged.add(PROMPT)
        paged.add(PROMPT[5:40])
        other = torch.full_like(paged.caches[0], float("nan"))
        for lengths in ({0: 20, 1: 9}, *STEPS[1:]):
            token_ids, batch, order = paged.batch(lengths)
            found.append(model.hidden(token_ids, batch, [*paged.caches, other]))
            for i in order:
                paged.rows[i].done += lengths[i]
        assert other.isnan().all()
        return found

    expected = steps()
    model.capture()
    runs = counted(monkeypatch, "hidden")
    for found, truth in zip(steps(), expected, strict=True):
        assert found.dtype == truth.dtype and torch.equal(found, truth)
    assert runs == [29, 13, 2, 1]


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


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v2"])
def test_a_step_that_samples_nothing_writes_its_cache(tmp_path: Path, family: str) -> None:
    model = captured(tmp_path, family)
    paged, twin = Paged(model), Paged(model)
    for one in (paged, twin):
        one.add(PROMPT)
    token_ids, batch, _ = paged.batch({0: 20})
    assert model(token_ids, batch, paged.caches, torch.zeros(0, dtype=torch.int64)).shape == (0, 384)
    paged.rows[0].done = 20
    twin.step({0: 20})
    assert torch.equal(paged.step({0: 20})[0], twin.step({0: 20})[0])


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_what_lies_outside_is_refused_before_anything_is_written(tmp_path: Path, family: str) -> None:
    model = captured(tmp_path, family)
    paged = Paged(model)
    paged.add(PROMPT)
    token_ids, batch, _ = paged.batch({0: 20})
    rows = torch.tensor([19])
    for field, value, message in (
        ("positions", 4096, "position 4096 of token 7 is outside the table of 4096"),
        ("cache_slots", 64 * 16, "cache_slots\\[7\\] is 1024, the cache has 1024"),
    ):
        changed = getattr(batch, field).clone()
        changed[7] = value
        with pytest.raises(ValueError, match=message):
            model(token_ids, dataclasses.replace(batch, **{field: changed}), paged.caches, rows)
    with pytest.raises(ValueError, match=r"sample_rows\[0\] is 20, the step has 20 tokens"):
        model(token_ids, batch, paged.caches, rows + 1)
    assert all(cache.isnan().all() for cache in paged.caches)
    token_ids[3] = 384
    with pytest.raises(ValueError, match="token id 384 is not in the vocabulary of 384"):
        model(token_ids, batch, paged.caches, rows)

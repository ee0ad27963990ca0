"""Steps that native calls make and run: the same tensors, tokens and failures as operation by operation."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, make_checkpoint
from harness import BLOCK_TOKENS, Harness
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenrelay.kernels import registry
from tokenrelay.kernels.step import HostSteps, SlotSettings
from tokenrelay.libscheduler import Plan
from tokenrelay.runtime.executor.batch import BatchBuilder, batch_of, shared
from tokenrelay.runtime.models.capture import Capture
from tokenrelay.runtime.requests import Finish, SamplingParams
from tokenrelay.runtime.weights.loader import load_model
from tokenrelay.runtime.weights.quantize import quantize_model

SLOTS, BLOCKS_MAX, BLOCKS = 6, 8, 40
TABLE = np.random.default_rng(0).integers(0, BLOCKS, (SLOTS, BLOCKS_MAX), dtype=np.int32)


def settings_of(special: tuple[int, ...] = ()) -> SlotSettings:
    draw = np.random.default_rng(1)
    return SlotSettings(
        temperature=draw.random(SLOTS, np.float32),
        top_p=draw.random(SLOTS, np.float32),
        min_p=draw.random(SLOTS, np.float32),
        top_k=draw.integers(0, 9, SLOTS, dtype=np.int32),
        choice=draw.integers(0, 9, SLOTS, dtype=np.int32),
        seed=draw.integers(-(2**63), 2**63 - 1, SLOTS, dtype=np.int64),
        output_start=draw.integers(0, 9, SLOTS, dtype=np.int64),
        special=np.isin(np.arange(SLOTS), special),
    )


def over(asked: SlotSettings) -> HostSteps:
    caches = [torch.zeros(BLOCKS, BLOCK_TOKENS, 4)]
    steps = HostSteps.over(shared(TABLE), BLOCK_TOKENS, asked, caches, torch.zeros(SLOTS, dtype=torch.int64))
    assert steps is not None
    return steps


def made(steps: HostSteps, plan: Any) -> Any:
    return steps.make(plan.slots, plan.starts, plan.lengths, plan.samples, plan.feedback, plan.token_ids, plan.decodes)


@st.composite
def plans(draw: st.DrawFn) -> Any:
    """Any rows: decodes, some with drafts, then chunks; each slot once."""
    slots = draw(st.permutations(range(SLOTS)))[: draw(st.integers(1, SLOTS))]
    decodes = draw(st.integers(0, len(slots)))
    drafted = draw(st.booleans())
    rows = []
    for i, slot in enumerate(slots):
        length = draw(st.integers(1, 4 if i < decodes and drafted else 1 if i < decodes else 40))
        start = draw(st.integers(0, BLOCKS_MAX * BLOCK_TOKENS - length))
        feeds = i < decodes and length == 1 and draw(st.booleans())
        rows.append((slot, start, length, i < decodes or draw(st.booleans()), feeds))
    columns = [list(column) for column in zip(*rows, strict=True)]
    tokens = sum(columns[2])
    return SimpleNamespace(
        slots=np.array(columns[0], np.int32),
        starts=np.array(columns[1], np.int32),
        lengths=np.array(columns[2], np.int32),
        samples=np.array(columns[3], np.uint8),
        feedback=np.array(columns[4], np.uint8),
        token_ids=np.arange(7, 7 + tokens, dtype=np.uint32),
        decodes=decodes,
        drafted=drafted,
        tail_tokens=np.zeros(0, np.int32),
    )


@settings(max_examples=200, deadline=None)
@given(plan=plans())
def test_its_tensors_are_the_batch_builders(plan: Plan) -> None:
    asked = settings_of()
    steps = over(asked)
    step = made(steps, plan)
    found = batch_of(steps, step, ())
    truth = BatchBuilder(TABLE, BLOCK_TOKENS, torch.device("cpu")).build(plan)
    for name in ("token_ids", "feedback_at", "feedback_slots", "sample_rows", "sample_slots_device"):
        same(name, getattr(found, name), getattr(truth, name))
    for name in ("block_table", "slots", "starts", "lengths", "offsets", "positions", "cache_slots"):
        same(name, getattr(found.attention, name), getattr(truth.attention, name))
    assert (found.attention.decodes, found.attention.context_max) == (
        truth.attention.decodes,
        truth.attention.context_max,
    )
    assert found.sample_slots.tolist() == truth.sample_slots.tolist()
    assert found.sample_ends.tolist() == truth.sample_ends.tolist()
    sampling, slots = steps.sampling(step), truth.sample_slots
    for name in ("temperature", "top_p", "top_k", "min_p", "seed", "choice"):
        same(name, getattr(sampling, name), torch.from_numpy(getattr(asked, name)[slots]))
    same("position", sampling.position, torch.from_numpy(truth.sample_ends - asked.output_start[slots]))
    assert step.chunk_max == max(plan.lengths[plan.decodes :].tolist(), default=0)
    assert step.start_min == min(plan.starts[plan.decodes :].tolist(), default=0)


def same(name: str, found: torch.Tensor | None, truth: torch.Tensor | None) -> None:
    if found is None or truth is None:
        assert found is truth, name
    else:
        assert found.dtype == truth.dtype and torch.equal(found, truth), name


def one_row(**fields: Any) -> Any:
    row = {
        "slots": np.array([2], np.int32),
        "starts": np.array([5], np.int32),
        "lengths": np.array([3], np.int32),
        "samples": np.array([1], np.uint8),
        "feedback": np.array([0], np.uint8),
        "token_ids": np.array([1, 2, 3], np.uint32),
        "decodes": 0,
    }
    return SimpleNamespace(**{**row, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"slots": np.array([SLOTS], np.int32)}, "row 0: slot 6 is not in block_table"),
        ({"starts": np.array([-1], np.int32)}, "row 0: negative start, or no tokens"),
        ({"lengths": np.array([0], np.int32)}, "row 0: negative start, or no tokens"),
        ({"starts": np.array([126], np.int32)}, "row 0: its context is longer than block_table is wide"),
        ({"token_ids": np.array([1, 2], np.uint32)}, "token_ids has 2 tokens, the rows have 3"),
        ({"samples": np.array([1, 1], np.uint8)}, "samples has 2 elements, expected 1"),
        ({"decodes": 2}, "decodes is not a number of the rows"),
    ],
)
def test_rows_outside_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(over(settings_of()), one_row(**fields))


def test_a_row_that_asks_for_more_is_told() -> None:
    steps = over(settings_of(special=(2,)))
    assert made(steps, one_row()).special
    assert not made(steps, one_row(samples=np.array([0], np.uint8))).special
    assert not made(steps, one_row(slots=np.array([1], np.int32))).special


def test_settings_of_another_type_are_refused() -> None:
    asked = settings_of()
    wrong = SlotSettings(**{name: getattr(asked, name) for name in SlotSettings.__slots__} | {"top_k": asked.seed})
    with pytest.raises(ValueError, match=r"a setting is int64 \(6,\), expected int32 \(6,\)"):
        over(wrong)


SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, top_k=40, seed=11)
PLENTY = SamplingParams(presence_penalty=0.5, logprobs=2)


def transcripts(model: Any, monkeypatch: pytest.MonkeyPatch, **sizes: Any) -> tuple[list[list[int]], int]:
    """Long and short prompts, greedy, sampled and with more asked, side by side; and how many steps ran natively."""
    runs = 0
    run = HostSteps.run

    def counting(self: HostSteps, *arguments: Any) -> Any:
        nonlocal runs
        runs += 1
        return run(self, *arguments)

    monkeypatch.setattr(HostSteps, "run", counting)
    with Harness(model, **sizes) as harness:
        first = [harness.submit(range(5, 5 + size), 24, sampling=SAMPLED) for size in (7, 40)]
        first += [harness.submit([9, 8, 9, 8, 9, 8, 9], 24), harness.submit(range(50, 83), 24)]
        told = harness.wait(*first)
        special = [harness.submit(range(3, 20), 12, sampling=PLENTY), harness.submit(range(3, 21), 12)]
        told += harness.wait(*special)
        harness.assert_quiet()
    return [transcript.token_ids for transcript in told], runs


def module_by_module(patch: pytest.MonkeyPatch) -> None:
    """From now on no model has a program."""
    patch.setattr(Capture, "program", lambda self: None)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["plain", "int8", "int4"])
def test_an_engine_says_the_same_either_way(
    tmp_path: Path, family: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(make_checkpoint(tmp_path / "m", family), dtype=torch.float32, block_tokens=BLOCK_TOKENS)
    if form != "plain":
        quantize_model(model, form)
    for draft_tokens in (0, 4):
        found, runs = transcripts(model, monkeypatch, draft_tokens=draft_tokens)
        assert runs > 20
        with monkeypatch.context() as apart:
            module_by_module(apart)
            truth, others = transcripts(model, apart, draft_tokens=draft_tokens)
        assert others == 0
        assert found == truth


def test_deterministic_steps_are_run_natively(deepseek: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.deterministic()
    try:
        found, runs = transcripts(deepseek, monkeypatch)
        assert runs > 20
        module_by_module(monkeypatch)
        assert transcripts(deepseek, monkeypatch) == (found, 0)
    finally:
        registry.deterministic(False)


@pytest.mark.parametrize(("dtype", "form"), [("float32", ""), ("float32", "int8"), ("bfloat16", "")])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_lowest_token_wins_among_equals(
    tmp_path: Path, dtype: str, form: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy steps write no logits: whoever has the largest is found while they are made, by several threads."""
    folder = make_checkpoint(tmp_path / "m", "qwen3", vocab_size=1200)
    model = load_model(folder, dtype=getattr(torch, dtype), block_tokens=BLOCK_TOKENS)
    table = model.head.table
    for first in (400, 800):  # every logit three times, far apart
        table[first : first + 400] = table[:400]
    if form:
        quantize_model(model, form)
    prompts = [[(7 * i + j) % 400 for j in range(5)] for i in range(6)]

    def answers() -> list[list[int]]:
        with Harness(model, threads=threads) as harness:
            return harness.run(*prompts, tokens_max=24)

    found = answers()
    assert all(token < 400 for tokens in found for token in tokens)
    assert len({token for tokens in found for token in tokens}) > 10
    module_by_module(monkeypatch)
    assert answers() == found


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_end_their_request_alone(
    tmp_path: Path, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the native call finds them: the other one of the same step goes on, and so does the engine."""
    model = load_model(make_checkpoint(tmp_path / "m", "qwen3"), dtype=torch.float32, block_tokens=BLOCK_TOKENS)
    expected, runs = transcripts(model, monkeypatch)
    model.embed.weight[77] = value
    with Harness(model) as harness:
        for _ in range(2):
            broken = harness.submit([5, 77, 6], 8)
            whole = harness.submit([9, 8, 9, 8, 9, 8, 9], 24)
            told, others = harness.wait(broken, whole)
            assert told.finish is Finish.ERROR and not told.token_ids
            assert "logits are not finite" in str(told.terminals[0].error)
            assert others.token_ids == expected[2]
        harness.assert_quiet()
    assert runs > 20

"""Whole models on Triton's kernels, decode steps replayed by a graph's rules: the host decides nothing of a step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint
from harness import BLOCK_TOKENS, Harness, plain_greedy, plain_logits
from predictions import make_steady_checkpoint
from recording import Recording
from triton_cases import DEVICE, FULL

from tokenrelay.kernels import registry
from tokenrelay.kernels.layout import MlaLayout
from tokenrelay.runtime import build
from tokenrelay.runtime.executor.device import DeviceExecutor
from tokenrelay.runtime.executor.graphs import DeviceGraphs
from tokenrelay.runtime.predicted import Pace, PredictedDrafter
from tokenrelay.runtime.requests import SamplingParams
from tokenrelay.runtime.weights.loader import load_model

PATHS = {
    "rms_norm": "triton/rows",
    "add_rms_norm": "triton/rows",
    "silu_mul": "triton/rows",
    "rotary": "triton/rows",
    "mla_cache_write": "triton/rows",
    "gqa_cache_write": "triton/rows",
    "mla_rotary_write": "triton/rows",
    "gqa_rotary_write": "triton/rows",
    "mla_decode": "triton/balanced",
    "mla_prefill": "triton/balanced",
    "gqa_decode": "triton/balanced",
    "gqa_prefill": "triton/balanced",
    "moe": "triton/grouped",
    "moe_route": "triton/rows",
    "sample": "triton/rows",
    **dict.fromkeys(("linear", "mla_absorb", "mla_expand", "finite_rows"), "ref/torch"),
}


@contextlib.contextmanager
def on_triton(**instead: str) -> Iterator[None]:
    """Every operation as it would be on a device."""
    with contextlib.ExitStack() as stack:
        for op, path in {**PATHS, **instead}.items():
            stack.enter_context(registry.force(op, path))
        yield


@pytest.fixture(scope="module", params=["deepseek_v3", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = make_checkpoint(tmp_path_factory.mktemp("models") / request.param, request.param)
    return load_model(folder, dtype=torch.float32, block_tokens=BLOCK_TOKENS, device=DEVICE)


def test_replays_give_the_tokens_of_a_plain_run(model: Any) -> None:
    """Sequences of several lengths, one of which crosses into a new block, and that end one after the other."""
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7], [2, 7, 1], [1, 6]]
    counts = [5, 4, 2]
    expected = [plain_greedy(model, p, n) for p, n in zip(prompts, counts, strict=True)]
    backend = DeviceGraphs(DEVICE) if FULL else Recording()
    with on_triton(), Harness(model, graphs=backend, slots=4) as harness:
        ids = [harness.submit(p, n) for p, n in zip(prompts, counts, strict=True)]
        found = [t.token_ids for t in harness.wait(*ids)]
        executor = harness.engine._executor
        assert isinstance(executor, DeviceExecutor)
        stats = executor.captures.stats
        assert not harness.fatal
    assert found == expected
    assert stats.refused == 0
    assert stats.replays > len(stats.recorded) > 1
    if isinstance(backend, Recording):
        assert min(backend.launches) > 10 * model.config.layers - 10


def test_drafts_and_drawn_tokens_are_replayed_too(model: Any) -> None:
    """Runs of rows of one sequence are folded into heads; their tokens are those of a run without drafts."""
    prompt = [5, 6, 7, 8] * 5
    drawn = SamplingParams(temperature=0.9, top_k=30, seed=5)
    with Harness(model) as plain:
        expected = plain.run(prompt, tokens_max=4, sampling=drawn)
    backend = DeviceGraphs(DEVICE) if FULL else Recording()
    with on_triton(), Harness(model, graphs=backend, slots=1, draft_tokens=2) as harness:
        assert harness.run(prompt, tokens_max=4, sampling=drawn) == expected


def test_a_prediction_layer_is_replayed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which drafted tokens came true, the entries of the layer's KV and what is asked next: all found on the device."""
    monkeypatch.setattr(PredictedDrafter, "_best_width", lambda self, rates, *_: (len(rates), 1.0))
    monkeypatch.setattr(Pace, "pays", lambda _: None)
    folder = make_steady_checkpoint(tmp_path / "model", noise=0.1)
    options: dict[str, Any] = {"dtype": torch.float32, "block_tokens": BLOCK_TOKENS, "device": DEVICE}
    prompt, count = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9], 9
    expected = plain_greedy(load_model(folder, **options), prompt, count)
    backend = DeviceGraphs(DEVICE) if FULL else Recording()
    model = load_model(folder, prediction="on", **options)
    with on_triton(), Harness(model, graphs=backend, slots=1, draft_tokens=2) as harness:
        assert harness.run(prompt, tokens_max=count) == [expected]
        drafts, executor = harness.engine.stats.drafts, harness.engine._executor
        assert isinstance(executor, DeviceExecutor)
        assert executor.captures.stats.refused == 0 < executor.captures.stats.replays
        assert not harness.fatal
    assert drafts.proposer == "mtp" and drafts.accepted > 0.5 * drafts.tokens > 0


def test_a_kernel_that_asks_the_host_cannot_be_recorded(model: Any) -> None:
    """The reference reads lengths from the device: such a step runs by itself, and its tokens are right."""
    attention = "mla_decode" if isinstance(model.config.kv_layout, MlaLayout) else "gqa_decode"
    backend = DeviceGraphs(DEVICE) if FULL else Recording()
    with on_triton(**{attention: "ref/torch"}), Harness(model, graphs=backend, slots=2) as harness:
        assert harness.run([1, 2, 3], tokens_max=3) == [plain_greedy(model, [1, 2, 3], 3)]
        executor = harness.engine._executor
        assert isinstance(executor, DeviceExecutor)
        assert executor.captures.stats.refused > 0
        assert executor.captures.stats.recorded == []


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3"])
def test_float8_kv_is_replayed_too(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """KV in float8, written and read by Triton's kernels alone; the references say the same of the same cache."""
    monkeypatch.setattr(build, "pack_model", lambda _: None)  # a processor's kernels cannot be recorded
    folder = make_checkpoint(tmp_path / "model", family)
    load = {"dtype": torch.bfloat16, "block_tokens": BLOCK_TOKENS, "device": DEVICE}
    model = load_model(folder, kv_dtype="fp8", **load)
    kind = "mla" if family == "deepseek_v3" else "gqa"
    small = {f"{kind}_rotary_write": "triton/fp8"}
    small |= dict.fromkeys((f"{kind}_decode", f"{kind}_prefill"), "triton/balanced-fp8")
    backend = DeviceGraphs(DEVICE) if FULL else Recording()
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7]
    with on_triton(**small):
        logits, expected = plain_logits(model, prompt), plain_greedy(model, prompt, 3)
        with Harness(model, graphs=backend, slots=1) as harness:
            assert harness.run(prompt, tokens_max=3) == [expected]
            executor = harness.engine._executor
            assert isinstance(executor, DeviceExecutor)
            assert executor.captures.stats.refused == 0 < executor.captures.stats.replays
            assert not harness.fatal
    truth = plain_logits(model, prompt).double()
    assert float((logits.double() - truth).norm() / truth.norm()) < 0.03  # bfloat16's steps, in another order

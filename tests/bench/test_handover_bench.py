"""bench/handover.py measures a handover between two workers, and compares it with raw rates."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "handover.py"


@pytest.fixture
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_handover", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


async def test_it_measures_both_ways(bench: ModuleType, tmp_path: Path) -> None:
    model = bench.make_checkpoint(
        tmp_path / "mla",
        "deepseek_v3",
        dtype=torch.bfloat16,
        kv_lora_rank=bench.LATENT,
        qk_rope_head_dim=bench.ROPE,
        first_k_dense_replace=2,
        num_attention_heads=1,
    )
    cases = [bench.Case("shared", 200, way) for way in ("overlap", "at once")]
    await bench.measure_kind(model, cases, warm_up=64, repeats=1)
    moved = 256 * (512 + 64) * 2 * 2  # four blocks
    rates = [{"nixl_raw": {1 << 20: 1e9}, "shared": {1 << 20: 2e9}}] * 2
    for case in cases:
        row = bench.row_of(case, 2, rates)
        assert row["bytes"] == moved and row["raw_ms"] == pytest.approx(moved / 1e6, abs=0.01)
        assert row["shared_ms"] == pytest.approx(row["raw_ms"] / 2, abs=0.01)
        assert 0 < row["ttft_ms"] < 60_000
    assert list(bench.overheads(cases)) == ["shared, 0k: time to first token, two workers by one"]


def test_a_quick_run_has_one_long_prompt(bench: ModuleType) -> None:
    quick = [case for kind in ("shared", "nixl") for case in bench.cases_of(kind, True)]
    assert [case.transport for case in quick if case.tokens == bench.SIZES[-1]] == ["nixl"]
    assert len(bench.cases_of("stream", False)) == 2 * len(bench.SIZES)

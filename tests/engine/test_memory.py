"""Sizes of the KV pool: what decides, what is refused, what is lowered."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tokenrelay.base.errors import ConfigError
from tokenrelay.kernels.layout import GqaLayout, MlaLayout
from tokenrelay.runtime.executor import memory
from tokenrelay.runtime.executor.memory import Pool, allocate_caches, available_bytes, plan_pool
from tokenrelay.runtime.executor.threads import SMALL_MODEL_BYTES, default_threads

MLA = MlaLayout(rank=32, rope=8, block_tokens=16)
BLOCK_BYTES = 2 * 16 * 40 * 4  # two layers, float32


def plan(**fields: object) -> Pool:
    defaults = {"slots": 4, "context_tokens": 160, "context_asked": False}
    return plan_pool(MLA, 2, torch.float32, **{**defaults, **fields})  # type: ignore[arg-type]


def test_blocks_or_memory_decide() -> None:
    assert plan(blocks=50) == Pool(50, 160, 50 * BLOCK_BYTES)
    assert plan(kv_memory_bytes=33 * BLOCK_BYTES + 5).blocks == 33


def test_the_default_is_a_quarter_of_what_is_free_and_no_more_than_slots_can_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 4 * 60 * BLOCK_BYTES)
    assert plan().blocks == 60
    monkeypatch.setattr(memory, "available_bytes", lambda: 1 << 40)
    assert plan().blocks == 2 * 4 * 10


def test_a_context_that_does_not_fit_is_lowered_or_refused_if_asked_for() -> None:
    assert plan(blocks=6).context_tokens == 96
    with pytest.raises(ConfigError, match="a context of 160 tokens needs 51200 bytes of KV, and there are 30720"):
        plan(blocks=6, context_asked=True)
    with pytest.raises(ConfigError, match="of --kv-memory"):
        plan(kv_memory_bytes=BLOCK_BYTES)


def test_available_memory_heeds_the_control_group(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 99 kB\nMemAvailable:    2048 kB\n")
    assert available_bytes(meminfo, tmp_path) == 2 << 20
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5\n")
    assert available_bytes(meminfo, tmp_path) == 2 << 20
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    assert available_bytes(meminfo, tmp_path) == 600_000


@pytest.mark.parametrize("layout", [MLA, GqaLayout(kv_heads=2, head_dim=8, block_tokens=16)])
def test_caches_have_the_layouts_shape_and_size(layout: MlaLayout | GqaLayout) -> None:
    pool = plan_pool(layout, 3, torch.bfloat16, slots=2, context_tokens=64, context_asked=True, blocks=7)
    caches = allocate_caches(layout, 3, pool, torch.bfloat16)
    assert len(caches) == 3 and all(cache.shape == layout.shape(7) for cache in caches)
    assert sum(cache.nbytes for cache in caches) == pool.bytes


def test_a_small_model_runs_on_one_thread() -> None:
    assert default_threads(SMALL_MODEL_BYTES - 1) == 1
    assert default_threads(SMALL_MODEL_BYTES) >= 1

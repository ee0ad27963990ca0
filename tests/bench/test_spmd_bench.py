"""bench/spmd.py: a compiled layer issues the collectives of one written by hand, and a difference is seen."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "spmd.py"


def load() -> Any:
    spec = importlib.util.spec_from_file_location("bench_spmd", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_spmd"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3"])
def test_a_tp2_program_issues_exactly_what_is_written_by_hand(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = load()
    with torch.inference_mode():
        figures = bench.overhead(name, 2)
        assert set(figures) == {f"{name}, {what}, us a layer" for what in ("by hand", "compiled", "beyond")}
        by_hand = bench.by_hand

        def once_more(model: Any, nothing: Any) -> Any:
            step = by_hand(model, nothing)

            def run(*given: Any) -> Any:
                nothing.seen.append("all_reduce tp (1, 64)")
                return step(*given)

            return run

        monkeypatch.setattr(bench, "by_hand", once_more)
        with pytest.raises(AssertionError, match="are not those by hand"):
            bench.overhead(name, 1)

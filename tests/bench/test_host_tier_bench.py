"""bench/host_tier.py: its shares add up, and a larger host tier computes less."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "host_tier.py"


def load() -> Any:
    spec = importlib.util.spec_from_file_location("bench_host_tier", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_host_tier"] = module
    spec.loader.exec_module(module)
    return module


def test_more_room_in_host_memory_computes_less() -> None:
    bench = load()
    requests = bench.Agents(3, 12, 0.2).requests()
    rows = bench.measure("agents", requests, (300,), (0, 2, 8), Console(quiet=True))
    without, some, much = rows
    assert without["loaded"] == without["written_back"] == 0
    assert without["computed"] == without["computed_by_one_pool_of_both"]
    assert without["computed"] > some["computed"] > much["computed"] >= much["computed_by_one_pool_of_both"]
    assert much["loaded"] > some["loaded"] > 0 and much["written_back"] <= 1

"""bench/transfer.py measures every transport that is here, beside raw NIXL."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tokenrelay.transfer.runs import coalesce
from tokenrelay.transfer.select import available

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "transfer.py"


@pytest.fixture
def bench() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("bench_transfer", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_cases_move_what_they_say(bench: ModuleType) -> None:
    for size in bench.SIZES:
        blocks = bench.SIZES[-1] // bench.BLOCK_BYTES // bench.LAYERS
        for order in ("neighbours", "scattered"):
            spans = bench.spans_of(size, order, blocks)
            runs = coalesce(spans, layers=bench.LAYERS, remote_blocks=blocks, local_blocks=blocks)
            assert runs.bytes(bench.layout().block_bytes) == size
            assert len(runs) <= bench.LAYERS if order == "neighbours" else len(runs) >= size // bench.BLOCK_BYTES * 0.9


# In a process of its own: NIXL's agents live as long as their process, and die badly in one that goes on to fork.
MEASURE = """
import asyncio, importlib.util, json, sys
spec = importlib.util.spec_from_file_location("bench_transfer", sys.argv[1])
bench = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)
bench.SIZES_QUICK, bench.REPEATS_MAX = [64 << 10, 1 << 20], 3
figures, results = asyncio.run(bench.measure(quick=True))
print(json.dumps([len(figures), results]))
"""


def test_it_measures_every_transport_here() -> None:
    run = subprocess.run([sys.executable, "-c", MEASURE, str(SCRIPT)], capture_output=True, text=True, timeout=90)
    assert run.returncode == 0, run.stderr[-4000:]
    figures, results = json.loads(run.stdout.splitlines()[-1])
    kinds = {*available(), *(["nixl_raw"] if "nixl" in available() else [])}
    assert {row["transport"] for row in results} == kinds
    assert len(results) == 4 * len(kinds)
    assert all(row["gb_per_s"] > 0 for row in results)
    assert all(("of_raw" in row) == ("nixl" in available() and row["transport"] != "nixl_raw") for row in results)
    assert figures == len(available())

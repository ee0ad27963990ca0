"""bench/replay.py: the modelled device, its workloads, and the search, without and with a scheduler."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"


def load(path: Path, name: str) -> Any:
    """A script of bench/, which is no package."""
    sys.path.insert(0, str(path.parent))
    try:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


device = load(BENCH / "simulation/device.py", "device")
workload = load(BENCH / "simulation/workload.py", "workload")
core = load(BENCH / "simulation/core.py", "core")
ours = load(BENCH / "simulation/ours.py", "ours")
replay = load(BENCH / "replay.py", "bench_replay")
H200 = device.DEVICES["h200-llama8b"]
OPEN = {"step_tokens": 8192, "chunk_tokens": 8192, "tps_fraction": 1.0}


def simulated(users: int, seconds: float, **policy: Any) -> dict[str, float]:
    """Agents on our scheduler."""
    spec = {"kind": "agents", "seconds": seconds}
    result = core.run(
        {"workload": spec, "load": users, "device": "h200-llama8b", "policy": {**OPEN, **policy}}, ours.Ours
    )
    assert isinstance(result, dict)
    return result


def test_a_step_costs_what_the_data_sheet_says() -> None:
    read_s = H200.weights_bytes / (4.8e12 * 0.8)
    assert H200.step_s(1, 0, []) == pytest.approx(0.0003 + read_s)
    assert H200.step_s(100, 0, []) == H200.step_s(1, 0, []), "few tokens cost the weights"
    products_s = 2 * 7.5e9 * 8192 / (1.979e15 * 0.5)
    attention_s = 4 * 32 * 32 * 128 * 8192**2 / 2 / (0.989e15 * 0.4)
    assert H200.step_s(0, 0, [(0, 8192)]) == pytest.approx(0.0003 + products_s + attention_s)
    assert H200.step_s(1, 100_000, []) - H200.step_s(1, 0, []) == pytest.approx(100_000 * 65_536 / (4.8e12 * 0.8))
    assert 20_000 < H200.kv_blocks(64) < 30_000


def test_equal_hash_ids_are_equal_tokens_and_no_others() -> None:
    one = workload.trace_prompt([1, 2, 40_000], 1_300)
    other = workload.trace_prompt([1, 2, 8_000, 5], 1_900)
    assert len(one) == 1_300 and len(other) == 1_900
    np.testing.assert_array_equal(one[:1024], other[:1024])
    assert (one[1024:] != other[1024:1300]).any() and (workload.trace_prompt([3], 512) != one[:512]).any()


def test_requests_of_one_instant_are_spread() -> None:
    assert workload.spread([5, 5, 5, 11, 12]) == [0.0, 2.0, 4.0, 6.0, 7.0]


def test_an_agents_next_turn_holds_what_was_answered() -> None:
    agents = workload.Agents(1, 1_000.0)
    (first,) = agents.begin()
    first.emitted, first.last_s = first.output, first.arrives_s + 1
    second = agents.after(first)
    assert second is not None and second.arrives_s > first.last_s
    size = len(first.prompt)
    np.testing.assert_array_equal(second.prompt[:size], first.prompt)
    assert (second.prompt[size : size + first.output] == workload.OUTPUT_TOKEN).all()
    assert len(second.prompt) > size + first.output


def test_users_keep_the_floor_and_without_it_they_do_not() -> None:
    held, plain = simulated(50, 60.0, tps_floor=70.0), simulated(50, 60.0, tps_floor=0.0)
    assert held["tps_p5"] > 69.3 > plain["tps_p5"]
    assert held["late_share"] < 0.01 and held["tpm"] > 0.9 * plain["tpm"]
    assert held["cached_share"] > 0.8, "turns do not find their prefix"
    again = simulated(50, 60.0, tps_floor=70.0)
    assert again == held, "the same simulation gives the same result"


def test_the_search_finds_the_highest_load_that_holds() -> None:
    asked: list[float] = []

    def run(at: float) -> dict[str, Any]:
        asked.append(at)
        return {"tps_p5": 100.0 if at <= 11.3 else 50.0, "ttft_p95_s": 1.0, "load": at}

    load = replay.Load("w", {}, 1.0, 10.0)
    best = replay.search(run, 70, load)
    assert best is not None and 10.3 < best["load"] <= 11.3 and len(asked) < 12
    whole = replay.search(run, 70, replay.Load("w", {}, 2.0, 10.0, whole=True))
    assert whole is not None and whole["load"] == 11
    assert replay.search(lambda at: {"tps_p5": 1.0, "ttft_p95_s": 1.0}, 70, load) is None
    late = replay.search(lambda at: {"tps_p5": 99.0, "ttft_p95_s": 11.0}, 70, load)
    assert late is None, "the time to the first token has a bound, too"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "expected timestamp"),
        ('{"timestamp": 0, "input_length": 600, "output_length": 3}', "hash_ids"),
        ('{"timestamp": 0, "input_length": 600, "output_length": 3, "hash_ids": [1]}', "a hash id for each 512 tokens"),
        ("", "has no requests"),
    ],
)
def test_a_trace_that_is_none_is_named(tmp_path: Path, line: str, said: str) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(line + "\n" if line else "")
    done = subprocess.run(
        [sys.executable, BENCH / "replay.py", "--quick", "--trace", trace], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0 and said in done.stderr and str(trace) in done.stderr


def test_the_picture_has_every_workload_and_scheduler() -> None:
    points = [
        {"workload": w, "variant": v, "load": n, "tpm": 1e6 * n, "tps_p5": 200.0 / n}
        for w in ("agents", "trace")
        for v in ("tokenrelay, floor 70", "vLLM V1, steps of 512")
        for n in (1, 2, 3)
    ]
    svg = replay.draw(points, ["agents", "trace"], (70, 200))
    assert svg.count("<polyline") == 4 and svg.count("stroke-dasharray") == 4 and svg.endswith("</svg>\n")


def test_a_trace_is_replayed(tmp_path: Path) -> None:
    trace = tmp_path / "small.jsonl"
    rows = [
        {"timestamp": 300 * n, "input_length": 1_500, "output_length": 40, "hash_ids": [0, n // 2, 1_000 + n]}
        for n in range(60)
    ]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = {"kind": "trace", "path": str(trace), "count": 60}
    result = core.run(
        {"workload": spec, "load": 0.5, "device": "h200-llama8b", "policy": {**OPEN, "tps_floor": 70}}, ours.Ours
    )
    assert result["requests"] >= 45 and result["unfinished"] == 0
    assert result["cached_share"] == pytest.approx((512 + 1024) / 2 / 1_500, rel=0.1), "half of them share 1,024 tokens"
    assert result["tps_p5"] > 200

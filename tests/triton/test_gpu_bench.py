"""bench/gpu.py where there is no GPU: it says so; its cases are right, and so are their floors."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tokenrelay.kernels import registry

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "gpu.py"
CPU = torch.device("cpu")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, with small sizes."""
    spec = importlib.util.spec_from_file_location("bench_gpu", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    for name, value in (("RANK", 64), ("ROPE", 16), ("NOPE", 16), ("VALUE", 16), ("PAGE", 16), ("CALLS_MAX", 2)):
        monkeypatch.setattr(module, name, value)
    return module


@contextlib.contextmanager
def on_triton(**paths: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for op, path in paths.items():
            stack.enter_context(registry.force(op, path))
        yield


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--json", str(target)]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}  # of those there may be, it sees none
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert "there is no GPU" in done.stderr
    result = json.loads(target.read_text(encoding="utf-8"))
    assert result["gpu"] is None
    assert result["results"] == []


def test_the_cases_compute_what_they_say(bench: ModuleType) -> None:
    """Each case's own check, on the kernels it times, in the interpreter."""
    with on_triton(mla_decode="triton/balanced", mla_prefill="triton/balanced", moe="triton/grouped"):
        assert bench.mla_decode_case(2, 1, 3, 40, CPU).check() < bench.ERROR_MAX
        assert bench.mla_decode_case(2, 3, 3, 40, CPU).check() < bench.ERROR_MAX
        assert bench.mla_prefill_case(30, [5, 3], 2, CPU).check() < bench.ERROR_MAX
        assert bench.moe_case(3, 4, 128, 32, CPU, small=False).check() < bench.ERROR_MAX
    with on_triton(mla_decode="triton/balanced-fp8", scaled_moe="triton/grouped"):
        assert bench.mla_decode_case(1, 1, 3, 40, CPU, small=True).check() < bench.ERROR_MAX
        assert bench.moe_case(3, 4, 128, 32, CPU, small=True).check() < bench.ERROR_MAX


def test_a_wrong_result_is_not_timed(bench: ModuleType) -> None:
    case = bench.Case("mla_decode", "x", 1000, 1000, [lambda: pytest.fail("timed")], lambda: float("nan"))
    assert "wrong" in bench.measure(case, {"read_gb_s": 1.0, "bf16_tflop_s": 1.0})


def test_floors(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek-V3's sizes: 128 rows of heads are where arithmetic takes over from memory."""
    monkeypatch.setattr(bench, "RANK", 512)
    monkeypatch.setattr(bench, "ROPE", 64)
    limits = {"read_gb_s": 4300.0, "bf16_tflop_s": 790.0}

    def floor(heads: int, queries: int) -> tuple[float, str]:
        size = bench.mla_bytes(64, queries, heads, 32_768, small=False)
        flops = bench.mla_flops(64, queries, heads, 32_768)
        return bench.floor_us(bench.Case("mla_decode", "", size, flops, [], lambda: 0.0), limits)

    assert floor(16, 1)[1] == floor(64, 1)[1] == "memory"
    assert floor(128, 1)[1] == "arithmetic"
    assert floor(16, 1)[0] == pytest.approx(64 * 32_768 * 1152 / 4300e3, rel=0.01)
    assert floor(64, 2)[0] == pytest.approx(floor(128, 1)[0], rel=0.01)


def test_absent_peers_are_named(bench: ModuleType) -> None:
    case = bench.mla_decode_case(1, 1, 2, 20, CPU)
    for name, module in (("flashinfer", "flashinfer"), ("flashmla", "flash_mla")):
        if importlib.util.find_spec(module) is None:
            assert "ModuleNotFoundError" in case.refused[name]

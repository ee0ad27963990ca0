"""bench/cpu_engine.py: how subjects are asked, what is reported when one fails, and the floor."""

from __future__ import annotations

import importlib.util
import io
import sys
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "cpu_engine.py"
ENGINE = """
import sys, time
sys.path.insert(0, {common!r})
from common import prompt, serve
assert len({{tuple(prompt(seed, 8)) for seed in range(50)}}) == 50
print("a peer talks on the way")
def decode(batch, context, tokens):
    if batch == 8:
        raise RuntimeError("no room")
    return {{"tokens_per_s": float(sys.argv[4] if len(sys.argv) > 4 else 40)}}
serve({{"decode": decode, "prefill": lambda tokens: {{"tokens_per_s": 100.0, "again_ms": 5.0}}}}, "9.9", time.time())
"""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script as a module, its models and engines in a folder of the test."""
    spec = importlib.util.spec_from_file_location("bench_cpu_engine", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    (tmp_path / "engine.py").write_text(ENGINE.format(common=str(SCRIPT.parent / "engines")))
    (tmp_path / "broken.py").write_text("raise SystemExit('it does not start')")
    monkeypatch.setattr(module, "ENGINES", tmp_path)
    monkeypatch.setattr(module, "checkpoint", lambda model: None)
    return module


class Still:
    """A memory that reads at 40 GB/s."""

    asked = 0

    def gb_s(self) -> float:
        self.asked += 1
        return 40.0


def test_engines_are_asked_and_failures_are_told(bench: ModuleType, tmp_path: Path) -> None:
    here, takes = Path(sys.executable), {"qwen3": ("bf16",)}
    subjects = [
        bench.Subject("tokenrelay", "engine.py", here, takes),
        bench.Subject("vllm", "broken.py", here, takes),
        bench.Subject("absent", "engine.py", tmp_path / "no-python", takes),
        bench.Subject("other forms", "engine.py", here, {"qwen3": ("int4",)}),
    ]
    reading = Still()
    rows = bench.measure(subjects, "qwen3", "bf16", 2, True, reading)
    assert {(row["case"], row["figure"]): row["value"] for row in rows if row["case"] != "ready"} == {
        ("decode_1", "tokens_per_s"): 40.0,
        ("decode_1", "of_floor"): 0.95,
        ("prefill_128", "tokens_per_s"): 100.0,
        ("prefill_128", "again_ms"): 5.0,
    }
    assert {row["subject"] for row in rows} == {"tokenrelay"}
    ours, vllm, absent, other = subjects
    assert ours.missing == "decode_8: RuntimeError: no room" and ours.version == "9.9" and ours.process is None
    assert "it does not start" in vllm.missing and "not installed" in absent.missing and not other.missing
    text = io.StringIO()
    bench.show(rows, subjects, Console(file=text, width=160))
    assert reading.asked == 4  # before and after it, in both rounds
    # 40 tokens a second of a model whose 948 MB are read at 40 GB/s: 42.2 would be the floor.
    assert "95%" in text.getvalue() and "no room" in text.getvalue()


def test_the_floor_counts_what_a_step_reads(bench: ModuleType) -> None:
    assert bench.read_bytes("qwen3", "bf16") == pytest.approx(948_043_776, rel=1e-3)  # all weights, by the loader
    assert bench.read_bytes("qwen3", "int8") == pytest.approx(bench.read_bytes("qwen3", "bf16") / 2, rel=1e-6)
    assert bench.read_bytes("qwen3", "int4") < bench.read_bytes("qwen3", "int8") * 0.7
    assert bench.read_bytes("deepseek", "bf16") < 0.45 * 2 * 720e6  # the experts that nobody chose are not read

"""bench/scheduler.py: the rows that it promises, and a peer that is not there."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench/scheduler.py"


def test_rows_of_every_case(tmp_path: Path) -> None:
    """Ours alone: one row a case, each with the parts it is made of."""
    target = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, SCRIPT, "--quick", "--without-peers", "--json", target],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(target.read_text())
    assert [row["case"] for row in result["results"]] == list(result["targets_us"])
    for row in result["results"]:
        assert row["subject"] == "tokenrelay" and 0 < row["median_us"] < 5_000, row
        assert row["median_us"] >= max(row["plan_us"], row["apply_us"])
    assert "(met)" in done.stdout


def test_a_peer_that_is_missing_or_fails_is_named(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("bench_scheduler", SCRIPT)
    assert spec and spec.loader
    bench = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = bench
    spec.loader.exec_module(bench)
    (tmp_path / "broken.py").write_text("raise SystemExit('cannot load its library')")
    absent = bench.Subject("absent", "ours.py", tmp_path / "no/python")
    broken = bench.Subject("broken", str(tmp_path / "broken.py"), Path(sys.executable))
    for subject in (absent, broken):
        subject.start()
        subject.wait_ready(30.0)
        bench.measure([subject], ["decode64_ctx4k_20k_room"], 1, 3, 0.0, 0.0)
        assert subject.row("decode64_ctx4k_20k_room") is None
        subject.stop()
    assert "--setup" in absent.missing
    assert broken.missing.endswith("cannot load its library")

"""`tokenrelay bench agent` with a server of its own and the bundled model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_the_bundled_model_is_measured(tmp_path: Path) -> None:
    out, report = tmp_path / "result.json", tmp_path / "report.html"
    command = [sys.executable, "-Pm", "tokenrelay.cli.main", "bench", "agent", "--load", "2", "--seconds", "6"]
    command += ["--scale", "0.02", "--turns", "4", "--floor", "1", "--json", str(out), "--html", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    (load,) = result["loads"]
    assert load["held"] and load["requests"] >= 2 and not load["errors"], load
    assert result["model"] == "tokenrelay-tiny" and result["answers_as_long_as_asked"]
    assert load["output_tokens"] == 10 * load["requests"], "answers are as long as was asked"
    assert 0 < load["hit_rate"] <= load["ideal_hit_rate"] + 0.05 < 1.05
    assert "<svg" in report.read_text() and "tokens a minute and device at 2 users" in done.stdout

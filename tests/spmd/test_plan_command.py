"""`tokenrelay plan`: the table, the picture, and one sentence for what cannot be."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

CONFIG = Path(__file__).parent / "configs" / "deepseek_v3.json"


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-Pm", "tokenrelay.cli.main", "plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_table_and_picture(tmp_path: Path) -> None:
    svg = tmp_path / "plan.svg"
    done = plan(str(CONFIG), "--tp", "8", "--dp", "8", "--experts", "whole", "--svg", str(svg))
    assert done.returncode == 0, done.stderr
    for word in ("Mesh(dp=8, tp=8)", "layers 4-59 (each)", "reduce_scatter", "bytes/token", "64 ranks"):
        assert word in done.stdout
    texts = [element.text or "" for element in ET.fromstring(svg.read_text()).iter() if element.tag.endswith("text")]
    assert "mlp.experts" in texts and any(text.startswith("all_gather dp") for text in texts)


def test_refusals_are_one_sentence() -> None:
    done = plan(str(CONFIG), "--ep", "7", "--json")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "cannot be dealt out evenly to 7 ranks" in done.stderr


def test_json() -> None:
    done = plan(str(CONFIG), "--tp", "4", "--json", "--tokens", "4")
    found = json.loads(done.stdout)
    assert found["mesh"] == {"pp": 1, "dp": 1, "cp": 1, "ep": 1, "tp": 4}
    assert sum(group["count"] for group in found["groups"]) == 63, "61 layers, embedding and head"

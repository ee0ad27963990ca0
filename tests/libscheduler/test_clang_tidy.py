"""tools/clang_tidy.sh fails on a use after move, which no compiler diagnoses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SEEDED = ROOT / "libscheduler" / "tests" / "tidy" / "use_after_move.cpp"


def clang_tidy(build: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run the script over the seeded file, as if the compiler got `flags`."""
    include = ROOT / "libscheduler" / "include"
    command = f"c++ -std=c++20 -I{include} {' '.join(flags)} -c {SEEDED}"
    build.mkdir()
    database = [{"directory": str(build), "file": str(SEEDED), "command": command}]
    (build / "compile_commands.json").write_text(json.dumps(database))
    script = [str(ROOT / "tools" / "clang_tidy.sh"), str(Path(sys.executable).parent), str(build), str(SEEDED)]
    return subprocess.run(["sh", *script], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(("flags", "passes"), [((), False), (("-DCORRECT",), True)])
def test_use_after_move_is_an_error(tmp_path: Path, flags: tuple[str, ...], passes: bool) -> None:
    """The seeded file is refused, and its correct twin is not."""
    done = clang_tidy(tmp_path / "build", *flags)
    assert (done.returncode == 0) is passes, done.stdout + done.stderr
    assert ("bugprone-use-after-move" in done.stdout) is not passes

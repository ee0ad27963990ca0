"""Runs every benchmark of this folder, one after the other, and prints what each measured.

    python bench/run.py --quick            # each with --quick: minutes in all
    python bench/run.py --only router      # one
    python bench/run.py --quick --json all.json

A benchmark is a script that takes `--quick` and `--json FILE` and writes an object with `figures` or `results`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
NO_BENCHMARKS = {"run.py", "load.py"}  # this, and what the soak shares with the tests
LIMIT_S = 4 * 3600


def find(only: list[str]) -> list[Path]:
    """The scripts to run, by name. SystemExit names what is not there."""
    scripts = sorted(path for path in FOLDER.glob("*.py") if path.name not in NO_BENCHMARKS and _is_benchmark(path))
    unknown = set(only) - {path.stem for path in scripts}
    if unknown:
        sys.exit(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(p.stem for p in scripts)}")
    return [path for path in scripts if not only or path.stem in only]


def _is_benchmark(path: Path) -> bool:
    """A script that takes --quick; helpers of benchmarks do not."""
    return "--quick" in path.read_text(encoding="utf-8")


def run(script: Path, quick: bool) -> dict[str, Any]:
    """Run one; its result, with `ok`, `seconds` and, where it failed, `error`."""
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "result.json"
        command = [sys.executable, str(script), "--json", str(target), *(["--quick"] if quick else [])]
        try:
            done = subprocess.run(command, stdout=subprocess.DEVNULL, timeout=LIMIT_S, check=False)
        except subprocess.TimeoutExpired:
            return {"ok": False, "seconds": LIMIT_S, "error": f"not done within {LIMIT_S} s"}
        result: dict[str, Any] = {"ok": done.returncode == 0, "seconds": round(time.monotonic() - began_s, 1)}
        try:
            result |= json.loads(target.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            result |= {"ok": False, "error": f"exit code {done.returncode}, and no result"}
    return result


def rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """(figure, value) of a result: its `figures`, each case of its `results`, its problems and its error."""
    found = [(name, _text(value)) for name, value in result.get("figures", {}).items()]
    for case in result.get("results", []):  # flat objects: words name the case, numbers are what was measured
        words = [value for value in case.values() if isinstance(value, str)]
        numbers = [f"{name} {_text(value)}" for name, value in case.items() if isinstance(value, int | float)]
        found.append((" ".join(words), ", ".join(numbers)))
    found += [("problem", problem) for problem in result.get("problems", [])]
    return found + [("error", result[name]) for name in ("error",) if name in result]


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> int:
    """Run them; exit code 1 when one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter runs: figures are rough")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this one; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all results into this file")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for script in find(options.only):
        print(f"{script.stem} …", file=sys.stderr, flush=True)
        result = results[script.stem] = run(script, options.quick)
        print(f"\n{script.stem}: {'ok' if result['ok'] else 'FAILED'} in {result['seconds']:.0f} s")
        for name, value in rows(result):
            print(f"  {name:<60} {value}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if all(result["ok"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

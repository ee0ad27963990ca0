"""How much one device carries while users keep their TPS floor: traces and agents through real schedulers, simulated.

    python bench/replay.py --trace conversation_trace.jsonl --trace synthetic_trace.jsonl
    python bench/replay.py --quick                       # generated agents only, short
    python bench/replay.py --trace T.jsonl --json result.json --svg docs/replay.svg

Requests arrive in virtual time at a modelled device (bench/simulation/device.py); the scheduler is the real one: ours
through its binding, vLLM's V1 objects in an environment of their own (bench/scheduler.py --setup). For each floor the
load is raised until the slowest 5 % of requests fall below it, or the 95th percentile of the time to the first token
passes its bound; the highest load that held is the figure. Loads of a trace are factors on its own rate; loads of
agents are users at work. Traces have Mooncake's format (FAST'25): one JSON object a line with timestamp (ms),
input_length, output_length and hash_ids (blocks of 512 tokens). docs/replay.md says what is modelled.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

from scheduler import Subject, about, all_subjects  # noqa: E402 - bench/scheduler.py, once its folder is known
from simulation.plot import draw  # noqa: E402

DEVICE = "h200-llama8b"
TRACE_BLOCK = 512  # tokens of a hash id
FLOORS = (70, 200)  # tokens per second of one user
WITHIN = 0.99  # a floor counts as held down to so much of it: percentiles of whole tokens are not exact
CACHE = ROOT / ".cache/bench/replay.jsonl"
RUNS_MAX_S = 1800.0  # one simulation
BISECTIONS = 3


@dataclasses.dataclass(frozen=True)
class Variant:
    """A scheduler with a configuration. `by_floor`: it is told the floor."""

    name: str
    subject: str
    policy: dict[str, Any]
    by_floor: bool = False

    def at(self, floor: int) -> dict[str, Any]:
        """Its configuration for a floor."""
        return {**self.policy, "tps_floor": floor} if self.by_floor else self.policy


@dataclasses.dataclass(frozen=True)
class Load:
    """A workload, where its search begins, and how long a first token may take (95th percentile, seconds)."""

    name: str
    spec: dict[str, Any]
    start: float
    ttft_max_s: float
    whole: bool = False  # loads are whole numbers
    unit: str = ""


# The floor sets the chunks; a device that can hold 200 is not held back by half of its batch-1 rate.
OURS = Variant("tokenrelay", "tokenrelay", {"step_tokens": 8192, "chunk_tokens": 8192, "tps_fraction": 1.0}, True)
PLAIN = {"overtakes_max": 0, "eviction": "lru"}
VARIANTS = (
    OURS,
    Variant("plain LRU/FCFS, steps of 2048", "tokenrelay", {**PLAIN, "step_tokens": 2048, "chunk_tokens": 2048}),
    Variant("plain LRU/FCFS, steps of 512", "tokenrelay", {**PLAIN, "step_tokens": 512, "chunk_tokens": 512}),
    Variant("vLLM V1, steps of 8192", "vllm", {"step_tokens": 8192}),
    Variant("vLLM V1, steps of 512", "vllm", {"step_tokens": 512}),
)


class Runs:
    """Simulations by subject, each in its process; what was run before with the same code is not run again."""

    def __init__(self, cache: Path | None, on_run: Callable[[str], None]) -> None:
        self._cache = cache
        self._on_run = on_run
        self._lock = threading.Lock()
        self._done: dict[str, dict[str, Any]] = {}
        self._subjects = {subject.name: subject for subject in all_subjects() if subject.name != "tokenspeed-scheduler"}
        for subject in self._subjects.values():
            subject.script = str(
                ROOT / "bench/simulation" / {"tokenrelay": "ours.py"}.get(subject.name, "vllm_policy.py")
            )
        if cache is not None and cache.exists():
            for line in cache.read_text(encoding="utf-8").splitlines():
                entry = json.loads(line)
                self._done[entry["key"]] = entry["result"]

    def start(self, subjects: Collection[str]) -> None:
        """Load these schedulers."""
        for name, subject in self._subjects.items():
            if name in subjects:
                subject.start()

    def close(self) -> None:
        """End their processes."""
        for subject in self._subjects.values():
            subject.stop()

    def missing(self) -> dict[str, str]:
        """Subject -> why it takes no part."""
        return {name: subject.missing for name, subject in self._subjects.items() if subject.missing}

    def run(self, subject_name: str, spec: dict[str, Any]) -> dict[str, Any] | None:
        """One simulation; None when the subject is not there. One thread a subject."""
        subject = self._subjects[subject_name]
        key = json.dumps([subject_name, _code_of(subject_name), _portable(spec)], sort_keys=True)
        with self._lock:
            known = self._done.get(key)
        if known is None:
            known = _ask(subject, spec)
            if known is None:
                return None
            with self._lock:
                self._done[key] = known
                if self._cache is not None:
                    self._cache.parent.mkdir(parents=True, exist_ok=True)
                    with self._cache.open("a", encoding="utf-8") as lines:
                        lines.write(json.dumps({"key": key, "result": known}) + "\n")
        self._on_run(subject_name)
        return known


def _ask(subject: Subject, spec: dict[str, Any]) -> dict[str, Any] | None:
    if not subject.version and not subject.missing:
        subject.wait_ready(300.0)
        subject.version = subject.version or "ready"
    if subject.missing or subject.process is None or subject.process.stdin is None:
        return None
    try:
        subject.process.stdin.write(json.dumps(spec) + "\n")
        subject.process.stdin.flush()
        answer: dict[str, Any] = subject.receive(RUNS_MAX_S)
        return answer
    except (OSError, RuntimeError) as error:
        subject.missing = str(error)
        return None


@functools.cache
def _code_of(subject_name: str) -> str:
    """A digest of what a cached run depends on beside its spec: the simulation, and our scheduler's sources."""
    simulation, ours = ROOT / "bench/simulation", subject_name == "tokenrelay"
    files = [simulation / f"{name}.py" for name in ("core", "device", "workload", "ours" if ours else "vllm_policy")]
    if ours:
        folders = [ROOT / "libscheduler" / name for name in ("include", "src", "bindings")]
        files += sorted(path for folder in folders for path in folder.rglob("*.?pp"))
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _portable(spec: dict[str, Any]) -> dict[str, Any]:
    """The spec without the folder that a trace lies in."""
    workload = dict(spec["workload"])
    if "path" in workload:
        workload["path"] = Path(workload["path"]).name
    return {**spec, "workload": workload}


def search(run: Callable[[float], dict[str, Any] | None], floor: int, load: Load) -> dict[str, Any] | None:
    """The run at the highest load that keeps the floor. None: not even the smallest, or the subject is missing."""

    def held(at: float) -> dict[str, Any] | None:
        found = run(at)
        if found is None or not found["tps_p5"] >= WITHIN * floor or not found["ttft_p95_s"] <= load.ttft_max_s:
            return None
        return found

    best, low, high = None, 0.0, load.start
    for _ in range(12):
        found = held(high)
        if found is None:
            break
        best, low, high = found, high, high * 2
    for _ in range(BISECTIONS + (low == 0) * 2):  # none held: look between nothing and the start
        middle = (low + high) / 2 if low == 0 else math.sqrt(low * high)
        middle = float(round(middle)) if load.whole else middle
        if load.whole and middle in (low, high, 0):
            break
        found = held(middle)
        if found is None:
            high = middle
        else:
            best, low = found, middle
    return best


def measure(runs: Runs, loads: Sequence[Load], variants: Sequence[Variant]) -> tuple[list[dict[str, Any]], list[Any]]:
    """(a row for each workload, floor and variant; every run that was made). Subjects run beside each other."""
    rows: list[dict[str, Any]] = []
    points: dict[tuple[str, str, float], dict[str, Any]] = {}

    def work(subject: str) -> None:
        for load in loads:
            for variant in (one for one in variants if one.subject == subject):
                for floor in FLOORS:

                    def run(at: float, variant: Variant = variant, floor: int = floor, load: Load = load) -> Any:
                        spec = {"workload": load.spec, "load": at, "device": DEVICE, "policy": variant.at(floor)}
                        found = runs.run(variant.subject, spec)
                        if found is not None:
                            label = f"{variant.name}, floor {floor}" if variant.by_floor else variant.name
                            points[load.name, label, at] = {"workload": load.name, "variant": label, **found}
                        return found

                    best = search(run, floor, load)
                    row = {"workload": load.name, "variant": variant.name, "floor_tps": floor}
                    rows.append(row | (best if best is not None else {"load": 0.0, "tpm": 0.0, "output_tpm": 0.0}))

    threads = [threading.Thread(target=work, args=(name,)) for name in {variant.subject for variant in variants}]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = [row for row in rows if next(v.subject for v in variants if v.name == row["variant"]) not in runs.missing()]
    place = {variant.name: index for index, variant in enumerate(variants)}
    names = [load.name for load in loads]
    rows.sort(key=lambda row: (names.index(row["workload"]), row["floor_tps"], place[row["variant"]]))
    return rows, list(points.values())


def show(rows: Sequence[dict[str, Any]], loads: Sequence[Load], out: Console) -> None:
    """A table for people."""
    units = {load.name: load.unit for load in loads}
    for floor in FLOORS:
        table = Table(title=f"highest load at which users keep {floor} tokens/s (one {DEVICE})")
        for name in ("workload", "scheduler", "load", "TPM", "output TPM", "p5 TPS", "p95 TTFT", "cached", "busy"):
            table.add_column(name, justify="left" if name in ("workload", "scheduler") else "right")
        for row in (row for row in rows if row["floor_tps"] == floor):
            if not row["tpm"]:
                table.add_row(row["workload"], row["variant"], "never", *["-"] * 6)
                continue
            table.add_row(
                row["workload"],
                row["variant"],
                f"{row['load']:.3g} {units[row['workload']]}",
                f"{row['tpm']:,.0f}",
                f"{row['output_tpm']:,.0f}",
                f"{row['tps_p5']:.1f}",
                f"{row['ttft_p95_s']:.1f} s",
                f"{row['cached_share']:.0%}",
                f"{row['busy_share']:.0%}",
            )
        out.print(table)


def check_trace(path: Path, count: int) -> None:
    """SystemExit names the line and the field that is not as Mooncake's traces have it."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()[:count]
    except OSError as error:
        sys.exit(f"trace {path} cannot be read: {error.strerror}")
    if not lines:
        sys.exit(f"trace {path} has no requests")
    before_ms = 0
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            at_ms, ids = row["timestamp"], row["hash_ids"]
            lengths_ok = row["input_length"] > 0 and row["output_length"] >= 0
        except (ValueError, KeyError, TypeError) as error:
            sys.exit(f"{path}:{number}: expected timestamp, input_length, output_length and hash_ids ({error!r})")
        if at_ms < before_ms or not lengths_ok or len(ids) * TRACE_BLOCK < row["input_length"]:
            sys.exit(
                f"{path}:{number}: expected growing timestamps, lengths, and a hash id for each {TRACE_BLOCK} tokens"
            )
        before_ms = at_ms


def workloads(traces: Sequence[Path], count: int, quick: bool) -> list[Load]:
    """Generated agents, and the traces that were named. SystemExit names a trace that is not there."""
    agents = {"kind": "agents", "seconds": 90.0 if quick else 300.0}
    loads = [Load("agents", agents, 8, 10.0, whole=True, unit="users")]
    for path in traces:
        check_trace(path, count)
        spec = {"kind": "trace", "path": str(path.resolve()), "count": min(count, 200) if quick else count}
        # Mooncake's own bound for the first token of these traces is 30 s (FAST'25, section 8).
        loads.append(Load(path.stem.removesuffix("_trace"), spec, 0.2, 30.0, unit="x"))
    return loads


def main() -> int:
    """Exit code 1 when ours could not run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", action="append", default=[], type=Path, metavar="FILE", help="repeatable")
    parser.add_argument("--count", type=int, default=300, help="requests of each trace [300]")
    parser.add_argument("--quick", action="store_true", help="less time and fewer schedulers: figures are rough")
    parser.add_argument("--json", metavar="FILE", help="write the result here (-: stdout)")
    parser.add_argument("--only", choices=["tokenrelay", "vllm"], help="the schedulers of this subject alone")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw every run here")
    parser.add_argument("--fresh", action="store_true", help="run again what was run before with the same code")
    options = parser.parse_args()
    began_s, facts = time.monotonic(), about()
    loads = workloads(options.trace, options.count, options.quick)
    only = "tokenrelay" if options.quick else options.only
    variants = [variant for variant in VARIANTS if only in (None, variant.subject)]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        # A search takes four doublings and its bisections, more or less.
        total = len(loads) * len(variants) * len(FLOORS) * (4 + BISECTIONS)
        task = progress.add_task("simulations", total=total)
        runs = Runs(None if options.quick or options.fresh else CACHE, lambda _: progress.advance(task))
        runs.start({variant.subject for variant in variants})
        try:
            rows, points = measure(runs, loads, variants)
        finally:
            runs.close()
        progress.update(task, completed=total)
    result = {
        "bench": "replay",
        **facts,
        "quick": options.quick,
        "device": DEVICE,
        "seconds": round(time.monotonic() - began_s, 1),
        "missing": runs.missing(),
        "results": rows,
        "runs": points,
    }
    out = Console(stderr=options.json == "-", width=150)
    show(rows, loads, out)
    for name, why in runs.missing().items():
        out.print(f"[yellow]{name} took no part: {why}")
    if options.svg:
        options.svg.write_text(draw(points, [load.name for load in loads], FLOORS), encoding="utf-8")
    if options.json == "-":
        print(json.dumps(result))
    elif options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if "tokenrelay" in runs.missing() else 0


if __name__ == "__main__":
    sys.exit(main())

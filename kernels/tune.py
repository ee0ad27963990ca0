"""Which kernel is fastest for a model's shapes on this machine: measured with the model itself, kept in a small file.

    result = tune(run)                 # run() computes a step or some of the model, operation by operation
    save(path, result.choices)
    registry.tuned(load(path))         # a worker, when it starts

Candidates are all kernels that can run, but for the references. The file names the machine; on another one it is
ignored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenrelay.base.errors import ConfigError
from tokenrelay.base.logging import get_logger
from tokenrelay.kernels import isa, registry
from tokenrelay.kernels.registry import TunedKey

VERSION = 1
GAIN_MIN = 0.03  # a smaller one is noise, and priorities stand
CHOICES_MAX = 4096

log = get_logger("kernels")


@dataclass(frozen=True, slots=True)
class Finding:
    """One operation in one shape."""

    key: TunedKey
    before: str  # the kernel that priorities choose
    before_us: float  # of all its calls in one run
    best: str
    best_us: float
    tried: int

    @property
    def gained(self) -> bool:
        """Whether another one is enough faster to be kept."""
        return self.best != self.before and self.best_us < self.before_us * (1 - GAIN_MIN)


def tune(run: Callable[[], object], rounds: int = 3) -> Iterator[Finding]:
    """Time every candidate of every operation that `run` uses; the shapes of one operation are timed together.

    `run` must dispatch through `ops`: a captured model does not. A figure is the best of `rounds`.
    """
    base = _measure(run, rounds)
    for op in registry.ops():
        keys = [key for key in base if key[0] == op]
        if not keys:
            continue
        times: dict[str, Mapping[TunedKey, float]] = {}
        for kernel in registry.kernels(op):
            if kernel.priority <= 0 or any(kernel.unmet(key[1], key[2], dict(key[3])) for key in keys):
                continue
            with registry.force(op, kernel.path):
                times[kernel.path] = _measure(run, rounds)
        for key in keys:
            before = registry.select(op, device=key[1], dtype=key[2], **dict(key[3])).path
            of = {path: found[key] for path, found in times.items() if key in found}
            best = min(of, key=of.__getitem__, default=before)
            yield Finding(key, before, of.get(before, base[key]), best, of.get(best, base[key]), len(of))


def _measure(run: Callable[[], object], rounds: int) -> dict[TunedKey, float]:
    """Microseconds of all calls of one run, by shape."""
    best: dict[TunedKey, float] = {}
    for _ in range(rounds):
        with registry.timing() as times:
            run()
        for key, seconds in times.items():
            best[key] = min(best.get(key, float("inf")), sum(seconds) * 1e6)
    return best


def machine() -> str:
    """What a file of choices holds for."""
    return f"{isa.machine()};{','.join(sorted(isa.features()))};{len(os.sched_getaffinity(0))} processors"


def save(path: Path, findings: list[Finding]) -> int:
    """Write what gained; the number of choices. What the file had for this machine and other shapes stays."""
    choices = load(path) if path.exists() else {}
    for finding in findings:
        choices.pop(finding.key, None)
        if finding.gained:
            choices[finding.key] = finding.best
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = [
        {"op": op, "device": device, "dtype": dtype, "dims": dict(dims), "path": chosen}
        for (op, device, dtype, dims), chosen in sorted(choices.items())
    ]
    text = json.dumps({"version": VERSION, "machine": machine(), "choices": entries}, indent=1) + "\n"
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)  # a worker that starts now reads the old one or the new one
    return len(choices)


def load(path: Path) -> dict[TunedKey, str]:
    """The choices of a file; none where it is of another machine or version. ConfigError where it makes no sense."""
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        if data["version"] != VERSION or data["machine"] != machine():
            log.warning("tuned kernels are of another machine and ignored", file=str(path))
            return {}
        choices = {
            (
                str(e["op"]),
                str(e["device"]),
                str(e["dtype"]),
                tuple(sorted((str(k), int(v)) for k, v in e["dims"].items())),
            ): str(e["path"])
            for e in data["choices"][:CHOICES_MAX]
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} does not hold tuned kernels ({type(error).__name__}: {error}); "
            "delete it, or write it anew with `tokenrelay kernels tune`"
        ) from error
    return choices

"""Every operation of a model's step beside what the machine could do: `tokenrelay kernels bench`.

ceiling = measure_ceiling(torch.bfloat16)
for line in measure(run, rounds=5):         # run() computes a step or some, operation by operation
    print(line.op, line.seconds, line.work.floor_s(ceiling) / line.seconds)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tokenrelay.kernels import registry
from tokenrelay.kernels.registry import TunedKey
from tokenrelay.kernels.work import Ceiling, Work, work_of

READ_BYTES = 512 << 20
PRODUCT = 2048  # rows, columns and depth of the matrix product whose rate is the ceiling
REPEATS = 5


@dataclass(frozen=True, slots=True)
class Line:
    """All calls of one operation in one shape, with as many tokens each."""

    op: str
    shape: str  # the dimensions it was chosen for
    tokens: int  # of its first argument
    path: str
    calls: int
    seconds: float  # of all of them, in the best round
    work: Work  # of all of them


def measure_ceiling(dtype: torch.dtype) -> Ceiling:
    """What all threads read from memory, and the rate of torch's 2048^3 product of this type: the best of some."""
    data = torch.ones(READ_BYTES // 4)
    a, b = (torch.randn(PRODUCT, PRODUCT).to(dtype) for _ in range(2))
    return Ceiling(READ_BYTES / _best_s(data.sum), 2 * PRODUCT**3 / _best_s(lambda: a @ b))


def measure(run: Callable[[], object], rounds: int = 3) -> list[Line]:
    """Time the operations of `run`, which must dispatch through `ops`. What took longest comes first."""
    best: dict[tuple[TunedKey, int], tuple[float, int, Work]] = {}
    for _ in range(rounds):
        found: dict[tuple[TunedKey, int], tuple[float, int, Work]] = {}

        def observe(
            key: TunedKey,
            arguments: tuple[Any, ...],
            result: Any,
            seconds: float,
            found: dict[tuple[TunedKey, int], tuple[float, int, Work]] = found,
        ) -> None:
            place = key, int(arguments[0].shape[0])
            before, calls, work = found.get(place, (0.0, 0, Work()))
            found[place] = before + seconds, calls + 1, work + work_of(key[0], arguments, result)

        with registry.timing(observe):
            run()
        for place, sums in found.items():
            if place not in best or sums[0] < best[place][0]:
                best[place] = sums
    lines = []
    for (key, tokens), (seconds, calls, work) in best.items():
        op, device, dtype, dims = key
        path = registry.select(op, device=device, dtype=dtype, **dict(dims)).path
        lines.append(Line(op, " ".join(f"{n}={size}" for n, size in dims), tokens, path, calls, seconds, work))
    return sorted(lines, key=lambda line: -line.seconds)


def _best_s(call: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(REPEATS):
        began_s = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began_s)
    return best

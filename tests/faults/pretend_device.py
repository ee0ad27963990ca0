"""A pretend device under a real engine: KV of a position is a fingerprint of the tokens up to it, kept in the pool.

A token follows from all the KV of its context, so a text is right only if every block of it is. Steps can be held.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tokenrelay.libscheduler import Plan
from tokenrelay.runtime.executor.executor import StepResult
from tokenrelay.runtime.requests import SamplingParams, TokenIds

VOCABULARY = 1000
MASK = (1 << 61) - 1
Kv = npt.NDArray[np.int64]  # [blocks, block_tokens]


def mix(last: int, token: int) -> int:
    """The KV of a position: it depends on everything before."""
    return (last * 6364136223846793005 + (token + 1) * 1442695040888963407) % MASK


def sample(kv: Sequence[int] | Kv) -> int:
    """The token after this context: it depends on the KV of each of its positions."""
    weights = np.arange(1, len(kv) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    total = int((np.asarray(kv, dtype=np.int64).astype(np.uint64) * weights).sum(dtype=np.uint64))
    return (total >> 23) % VOCABULARY


def text_of(prompt: Sequence[int], tokens: int) -> list[int]:
    """What a prompt gives when nothing goes wrong."""
    kv: list[int] = []
    last = 0
    for token in prompt:
        last = mix(last, token)
        kv.append(last)
    text: list[int] = []
    while len(text) < tokens:
        text.append(sample(kv))
        last = mix(last, text[-1])
        kv.append(last)
    return text


@dataclass
class _Row:
    """One row of a plan, as it was when the plan was made."""

    slot: int
    start: int
    inputs: list[int]
    feedback: bool
    samples: bool
    cells: npt.NDArray[np.int64]  # of positions [0, start + len(inputs)): where their KV is


@dataclass
class PretendStep:
    """A launched step."""

    rows: list[_Row]
    on_done: Callable[[], None]
    held: bool
    ended: threading.Event = field(default_factory=threading.Event)
    result: StepResult | None = None
    error: Exception | None = None

    @property
    def done(self) -> bool:
        """Whether `wait` returns at once."""
        return self.ended.is_set()

    def wait(self) -> StepResult:
        """What it sampled; raises what it raised."""
        assert self.ended.wait(60)
        if self.error is not None:
            raise self.error
        assert self.result is not None
        return self.result


class PretendDevice:
    """Implements runtime.engine.Launcher."""

    def __init__(self, kv: Kv, block_table: npt.NDArray[np.int32]) -> None:
        self.hold: Callable[[Plan], bool] = lambda plan: False  # steps that wait for `go`
        self.fail: Exception | None = None  # what the next step raises
        self.holding = threading.Event()  # a step waits
        self._go = threading.Event()
        self._kv = kv
        self._table = block_table
        self._sampled = [0] * block_table.shape[0]
        self._queue: queue.Queue[PretendStep | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def go(self) -> None:
        """Hold nothing any more."""
        self.hold = lambda plan: False
        self._go.set()

    def launch(
        self,
        plan: Plan,
        requests: Mapping[int, SamplingParams],
        token_ids_of: Callable[[int], TokenIds | None],
        on_done: Callable[[], None],
    ) -> PretendStep:
        """Queue it."""
        width, at, rows = self._kv.shape[1], 0, []
        for slot, start, length, feedback, samples in zip(
            plan.slots.tolist(),
            plan.starts.tolist(),
            plan.lengths.tolist(),
            plan.feedback.tolist(),
            plan.samples.tolist(),
            strict=True,
        ):
            positions = np.arange(start + length)
            cells = self._table[slot][positions // width].astype(np.int64) * width + positions % width
            inputs = plan.token_ids[at : at + length].tolist()
            rows.append(_Row(slot, start, inputs, bool(feedback), bool(samples), cells))
            at += length
        step = PretendStep(rows, on_done, self.hold(plan))
        if step.held:
            self._go.clear()
        self._queue.put(step)
        return step

    def close(self) -> None:
        """Let what was launched end."""
        self.go()
        self._queue.put(None)
        self._thread.join(30)

    def _run(self) -> None:
        while (step := self._queue.get()) is not None:
            if step.held:
                self.holding.set()
                self._go.wait(60)
                self.holding.clear()
            error, self.fail = self.fail, None
            if error is None:
                sampled = [token for row in step.rows if (token := self._compute(row)) is not None]
                step.result = StepResult(np.array(sampled, np.uint32), None, 10)
            step.error = error
            step.ended.set()
            step.on_done()

    def _compute(self, row: _Row) -> int | None:
        kv = self._kv.reshape(-1)
        last = int(kv[row.cells[row.start - 1]]) if row.start else 0
        inputs = [self._sampled[row.slot]] if row.feedback else row.inputs
        for position, token in enumerate(inputs, row.start):
            last = mix(last, token)
            kv[row.cells[position]] = last
        if not row.samples:
            return None
        self._sampled[row.slot] = sample(kv[row.cells])
        return self._sampled[row.slot]

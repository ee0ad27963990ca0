"""Decode steps recorded once for each size, and run again: a replay costs the host one call instead of one per kernel.

    captures = Captures(model, caches, block_table, …, backend=DeviceGraphs(device))
    if captures.takes(rows):
        staged = captures.stage(rows, plan, sampler)       # engine's thread
        captures.run(staged)                               # executor's thread: one copy in, one replay

A recorded step reads and writes the same memory at every replay, so all that changes between steps lies in one buffer
of bytes for each size: it is filled on the host, copied as a whole, and the device's tensors are views into its copy.
A size is a number of rows; a step of fewer rows is padded with rows that read one token of block 0, write their KV
nowhere and whose tokens nobody looks at. Whatever a kernel computes of a batch (the schedule of attention, for one) it
must compute on the device, as it is recorded too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokenrelay.base.logging import get_logger
from tokenrelay.kernels import ops
from tokenrelay.kernels.batch import AttentionBatch, SamplingBatch
from tokenrelay.libscheduler import Plan
from tokenrelay.runtime.executor.batch import Rows
from tokenrelay.runtime.executor.predictor import Predictor
from tokenrelay.runtime.executor.recorded_predictor import Asked, Asking, RecordedPredictor
from tokenrelay.runtime.executor.sampler import Sampler

log = get_logger("graphs")

ALIGN_BYTES = 16  # of each section: kernels load so much at once
Runnable = Callable[[Tensor, AttentionBatch, list[Tensor], Tensor], Tensor]


class Backend(Protocol):
    """How a device records work and is waited for; the tests have one that runs on a CPU."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record what `run` puts in the device's queue; the answer puts it there again. May run it too."""

    def host_bytes(self, count: int) -> Tensor:
        """uint8 [count] of host memory that the device copies from and to by itself."""

    def mark(self) -> Callable[[], None]:
        """A wait until all that is queued by now has ended."""


class Eager:
    """Records nothing: runs again. For devices without graphs, and for tests."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """See `Backend`."""
        run()
        return run

    def host_bytes(self, count: int) -> Tensor:
        """See `Backend`."""
        return torch.zeros(count, dtype=torch.uint8)

    def mark(self) -> Callable[[], None]:
        """See `Backend`."""
        return lambda: None


class DeviceGraphs:
    """The graphs of torch's devices (torch.cuda.CUDAGraph). They share one pool of memory: only one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """See `Backend`. Runs it once before, on the side: kernels are compiled and handles made then."""
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream(self._device).wait_stream(side)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile (the engine's makes the next batch), which the strictest mode forbids.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            run()
        self._pool = self._pool or graph.pool()
        replay: Callable[[], None] = graph.replay
        return replay

    def host_bytes(self, count: int) -> Tensor:
        """See `Backend`."""
        return torch.zeros(count, dtype=torch.uint8, pin_memory=True)

    def mark(self) -> Callable[[], None]:
        """See `Backend`. The wait sleeps: a spinning one would take a processor from the engine."""
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event.synchronize


def sizes_for(rows_max: int) -> tuple[int, ...]:
    """The sizes that are recorded: padding costs a quarter at most, and from 64 rows on an eighth."""
    sizes = [n for n in (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64) if n < rows_max]
    step = 64
    while step < rows_max:
        sizes += [n for n in range(step + step // 8, 2 * step + 1, step // 8) if n < rows_max]
        step *= 2
    return (*sizes, rows_max)


@dataclass(frozen=True, slots=True)
class _Section:
    """A part of the buffer."""

    offset: int
    count: int
    dtype: torch.dtype

    def of(self, buffer: Tensor) -> Tensor:
        """Its elements in `buffer` uint8."""
        return buffer[self.offset : self.offset + self.count * self.dtype.itemsize].view(self.dtype)


def _sections(rows: int, blocks: int, more: Mapping[str, tuple[int, torch.dtype]]) -> tuple[dict[str, _Section], int]:
    """By name, and the bytes of all. `more`: elements and their type, of a prediction layer."""
    counts: dict[str, tuple[int, torch.dtype]] = dict.fromkeys(
        ("token_ids", "slot", "positions", "cache_slots", "seed", "position", "feedback"), (rows, torch.int64)
    )
    counts |= dict.fromkeys(("temperature", "top_p", "min_p"), (rows, torch.float32))
    counts |= dict.fromkeys(("top_k", "choice", "starts"), (rows, torch.int32))
    counts["groups"] = (rows + 1, torch.int32)
    counts["table"] = (rows * blocks, torch.int32)
    counts |= more
    found, offset = {}, 0
    for name, (count, dtype) in counts.items():
        found[name] = _Section(offset, count, dtype)
        offset += -(-count * dtype.itemsize // ALIGN_BYTES) * ALIGN_BYTES
    return found, offset


@dataclass(slots=True, eq=False)
class Recorded:
    """One size. The host's half is the engine's thread's, the device's half the executor's."""

    rows: int
    group_max: int  # rows of one draft; 1: no drafts
    sections: dict[str, _Section]
    staging: list[tuple[Tensor, dict[str, npt.NDArray[Any]]]]
    turn: int = 0
    buffer: Tensor | None = None
    out: Tensor | None = None
    replay: Callable[[], None] | None = None
    asking: Asking | None = None  # with a prediction layer


@dataclass(frozen=True, slots=True)
class Staged:
    """A step that waits for its replay."""

    recorded: Recorded
    bytes: Tensor  # of the host, filled
    rows: int
    asked: Asked | None = None  # with a prediction layer


@dataclass(slots=True)
class CaptureStats:
    """What happened, for tests and logs."""

    recorded: list[tuple[int, int]] = field(default_factory=list)  # rows, group_max
    replays: int = 0
    refused: int = 0  # sizes that could not be recorded and run by themselves


class Captures:
    """The recorded steps of one model."""

    def __init__(
        self,
        model: Runnable,
        caches: list[Tensor],
        block_table: npt.NDArray[np.int32],
        last_token: Tensor,
        *,
        block_tokens: int,
        steps_in_flight: int,
        draft_tokens: int,
        backend: Backend,
        predictor: Predictor | None = None,
    ) -> None:
        """`last_token` int64 [slots + 1]: what each slot sampled last; padding writes the last one."""
        self._predictor = predictor
        self._recorded_predictor = (
            None if predictor is None else RecordedPredictor(predictor, block_table, block_tokens=block_tokens)
        )
        self._model = model
        self._caches = caches
        self._table = block_table
        self._last_token = last_token
        self._shift = block_tokens.bit_length() - 1
        self._mask = block_tokens - 1
        self._ring = steps_in_flight + 1  # the step that used a buffer last has ended when its turn comes again
        self._group_max = draft_tokens + 1
        self._backend = backend
        self._sizes = sizes_for(block_table.shape[0] * self._group_max)
        self._recorded: dict[tuple[int, int], Recorded] = {}
        self.stats = CaptureStats()
        self._lock = threading.Lock()  # of `_recorded`: `warm_up` may be called from another thread

    # -- engine's thread ----------------------------------------------------------------------------------------------
    def takes(self, rows: Rows) -> bool:
        """Whether a step of these rows can be a replay: decodes only, all of them sampled."""
        return rows.decodes == len(rows.slots) and bool(rows.samples.all()) and rows.decodes <= self._sizes[-1]

    def stage(self, rows: Rows, plan: Plan, sampler: Sampler) -> Staged:
        """Fill a buffer with what the step needs. Reads the block table as it is now."""
        count = rows.decodes
        size = next(size for size in self._sizes if size >= count)
        recorded = self._of(size, 1 if rows.groups is None else self._group_max)
        recorded.turn = (recorded.turn + 1) % self._ring
        buffer, host = recorded.staging[recorded.turn]
        self._pad(host, count)
        slots, starts = rows.slots, rows.starts
        blocks = self._table[slots, starts >> self._shift].astype(np.int64)
        host["token_ids"][:count] = plan.token_ids
        host["slot"][:count] = slots
        host["positions"][:count] = starts
        host["cache_slots"][:count] = (blocks << self._shift) | (starts & self._mask)
        host["feedback"][:count] = rows.feedback
        host["starts"][:count] = starts
        used = (int(starts.max()) >> self._shift) + 1
        host["table"].reshape(size, -1)[:count, :used] = self._table[slots, :used]
        groups = np.arange(count + 1, dtype=np.int32) if rows.groups is None else rows.groups
        host["groups"][: len(groups)] = groups
        host["groups"][len(groups) :] = count
        sampler.fill(host, slots.astype(np.int64), starts.astype(np.int64) + 1)
        asked = None if self._recorded_predictor is None else self._recorded_predictor.fill(host, rows, plan)
        return Staged(recorded, buffer, count, asked)

    def _pad(self, host: Mapping[str, npt.NDArray[Any]], count: int) -> None:
        """Rows from `count` on: greedy, one token of block 0, written nowhere."""
        for name in ("token_ids", "positions", "seed", "position", "feedback", "temperature", "min_p", "top_k"):
            host[name][count:] = 0
        host["choice"][count:] = 0
        host["top_p"][count:] = 1
        host["starts"][count:] = 0
        host["cache_slots"][count:] = -1
        host["slot"][count:] = self._table.shape[0]
        host["table"].reshape(len(host["starts"]), -1)[count:, 0] = 0
        if self._recorded_predictor is not None:
            self._recorded_predictor.pad(host, count, 0)

    def _of(self, size: int, group_max: int) -> Recorded:
        with self._lock:
            found = self._recorded.get((size, group_max))
            if found is None:
                more = {} if self._recorded_predictor is None else self._recorded_predictor.sections(size)
                sections, count = _sections(size, self._table.shape[1], more)
                staging = []
                for _ in range(self._ring):
                    buffer = self._backend.host_bytes(count)
                    host = {name: section.of(buffer).numpy() for name, section in sections.items()}
                    self._pad(host, 0)
                    host["groups"][:] = 0
                    staging.append((buffer, host))
                found = self._recorded[(size, group_max)] = Recorded(size, group_max, sections, staging)
        return found

    # -- executor's thread --------------------------------------------------------------------------------------------
    def run(self, staged: Staged) -> Tensor:
        """Put the step in the device's queue -> int64 [rows] on the device, as `sampled_or_not` says."""
        recorded = staged.recorded
        if recorded.replay is None:
            self._record(recorded)
        assert recorded.buffer is not None and recorded.out is not None and recorded.replay is not None
        if self._recorded_predictor is not None and staged.asked is not None:
            self._recorded_predictor.admit(staged.asked)
        recorded.buffer.copy_(staged.bytes, non_blocking=True)
        recorded.replay()
        self.stats.replays += 1
        return recorded.out[: staged.rows]

    def ask(self, staged: Staged) -> Tensor | None:
        """Queue what the prediction layer is asked -> `Asking.out` of the step's sequences; None: nothing."""
        asked, asking = staged.asked, staged.recorded.asking
        if asked is None or asking is None or asked.width == 0:
            return None
        assert asking.replay is not None
        for _ in range(asked.width):
            asking.replay()
        return asking.out[: len(asked.sequence_ids)]

    def warm_up(self) -> None:
        """Record every size, the largest first, so that the others fit in its memory."""
        for size in reversed(self._sizes):
            for group_max in {1, self._group_max}:
                recorded = self._of(size, group_max)
                if recorded.replay is None:
                    self._record(recorded)

    def _record(self, recorded: Recorded) -> None:
        """The recording computes rows of padding only."""
        device = self._caches[0].device
        spare = recorded.staging[recorded.turn][0].clone()  # its own may be filled for the next step already
        self._pad({name: section.of(spare).numpy() for name, section in recorded.sections.items()}, 0)
        recorded.buffer = spare.to(device)
        recorded.out = torch.zeros(recorded.rows, dtype=torch.int64, device=device)
        views = {name: section.of(recorded.buffer) for name, section in recorded.sections.items()}
        constants = torch.arange(recorded.rows + 1, dtype=torch.int32, device=device)
        rows = torch.arange(recorded.rows, dtype=torch.int64, device=device)
        ones = torch.ones(recorded.rows, dtype=torch.int32, device=device)

        def step() -> None:
            self._step(recorded, views, constants, rows, ones)

        part = self._recorded_predictor
        if part is not None:
            recorded.asking = part.asking(recorded.rows)
        recorded.replay, whole = self._capture(step, recorded.rows)
        if part is not None and recorded.asking is not None and recorded.asking.out.shape[1] > 1:
            asking = recorded.asking
            asking.replay, also = self._capture(lambda: part.ask(asking, views, recorded.rows), recorded.rows)
            whole = whole and also
        if whole:
            self.stats.recorded.append((recorded.rows, recorded.group_max))

    def _capture(self, run: Callable[[], None], rows: int) -> tuple[Callable[[], None], bool]:
        """The replay, and whether it is one."""
        try:
            return self._backend.capture(run), True
        except Exception as error:  # a kernel that waits for the device cannot be recorded: slower, not wrong
            log.warning("a decode step could not be recorded and runs by itself", rows=rows, error=repr(error))
            self.stats.refused += 1
            return run, False

    def _step(
        self, recorded: Recorded, views: dict[str, Tensor], constants: Tensor, rows: Tensor, ones: Tensor
    ) -> None:
        """What is recorded. The batch is a new object each time: kernels remember what they computed of one."""
        width = self._table.shape[1]
        batch = AttentionBatch(
            block_table=views["table"].view(recorded.rows, width),
            slots=constants[:-1],
            starts=views["starts"],
            lengths=ones,
            offsets=constants,
            positions=views["positions"],
            cache_slots=views["cache_slots"],
            decodes=recorded.rows,
            context_max=width << self._shift,
            groups=None if recorded.group_max == 1 else views["groups"],
            group_max=recorded.group_max,
        )
        slot = views["slot"]
        token_ids = torch.where(views["feedback"] > 0, self._last_token[slot], views["token_ids"])
        hidden = None
        if self._predictor is None:
            logits = self._model(token_ids, batch, self._caches, rows)
        else:
            hidden = self._predictor.model.hidden(token_ids, batch, self._caches)
            logits = self._predictor.logits(hidden)
        settings = SamplingBatch(
            *(views[name] for name in ("temperature", "top_p", "top_k", "min_p", "seed", "choice", "position"))
        )
        tokens, told = sampled_or_not(logits, settings)
        self._last_token[slot] = tokens
        assert recorded.out is not None
        recorded.out.copy_(told)
        if self._recorded_predictor is not None and recorded.asking is not None and hidden is not None:
            drafts = recorded.group_max > 1
            self._recorded_predictor.after_step(recorded.asking, views, drafts, token_ids, hidden, tokens)


def sampled_or_not(logits: Tensor, settings: SamplingBatch) -> tuple[Tensor, Tensor]:
    """Sample, without waiting -> tokens int64 [s], and the same for the host: -1 - token where the logits are no
    numbers (what is sampled there means nothing, zeros take their place)."""
    finite = ops.finite_rows(logits)
    logits.masked_fill_(~finite.unsqueeze(-1), 0.0)
    tokens = ops.sample(logits, settings)
    return tokens, torch.where(finite, tokens, -1 - tokens)

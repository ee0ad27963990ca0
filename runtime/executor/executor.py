"""Runs plans in order, in a thread of its own, behind the engine's.

    executor = Executor(model, caches, block_table, slots=64)
    step = executor.launch(plan, requests, token_ids_of, on_done=wake)      # returns at once
    result = step.wait()                                                    # raises what the step raised

The next plan is made while a step runs. What a step needs from the host is gathered by `launch`, in the caller's
thread, because the block table changes with the next plan; the token that a sequence sampled last stays on the device
and goes from step to step there.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokenrelay.base.errors import TokenRelayError
from tokenrelay.kernels.batch import AttentionBatch
from tokenrelay.libscheduler import Plan
from tokenrelay.runtime.executor.batch import Batch, BatchBuilder, begin
from tokenrelay.runtime.executor.grammars import GrammarSource
from tokenrelay.runtime.executor.predictor import PredictionWork, Predictor, Proposals
from tokenrelay.runtime.executor.sampler import Sampler, SampleWork
from tokenrelay.runtime.executor.threads import use_threads
from tokenrelay.runtime.requests import SamplingParams, TokenIds, TokenLogprobs

STEP_WAIT_MAX_S = 600.0  # a step that takes longer hangs: the caller gets an error instead of waiting for ever


class Runnable(Protocol):
    """The model, as the executor needs it."""

    def __call__(
        self, token_ids: Tensor, batch: AttentionBatch, caches: list[Tensor], sample_rows: Tensor, /
    ) -> Tensor:
        """Logits f32 [s, V] after the tokens `sample_rows` [s] of `token_ids` [t]."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step sampled."""

    token_ids: npt.NDArray[np.uint32]  # [s], in row order
    logprobs: dict[int, TokenLogprobs] | None  # by sampled row, for those that asked
    run_us: int  # time it ran, without waiting for its turn
    failures: dict[int, str] = field(default_factory=dict)  # row -> why its sequence cannot go on
    proposals: Proposals | None = None  # of a prediction layer; the time they took is not in `run_us`


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a step runs: made when it is launched."""

    batch: Batch
    sampling: SampleWork
    prediction: PredictionWork | None


class Step:
    """A launched step."""

    def __init__(self, number: int, work: StepWork | None, on_done: Callable[[], None]) -> None:
        self.number = number
        self._work = work
        self._on_done = on_done
        self._ended = threading.Event()
        self._result: StepResult | None = None
        self._error: BaseException | None = None

    @property
    def done(self) -> bool:
        """Whether `wait` returns at once."""
        return self._ended.is_set()

    def wait(self, timeout_s: float = STEP_WAIT_MAX_S) -> StepResult:
        """What it sampled. Raises what it raised, or TokenRelayError when it does not end in time."""
        if not self._ended.wait(timeout_s):
            raise TokenRelayError(f"step {self.number} did not end within {timeout_s} s")
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def take(self) -> StepWork:
        """What to run; given once, so that a finished step holds no tensors."""
        assert self._work is not None, "a step runs once"
        work, self._work = self._work, None
        return work

    def finish(self, result: StepResult | None, error: BaseException | None) -> None:
        """Called once, by the executor."""
        self._result, self._error = result, error
        self._ended.set()
        self._on_done()


class Executor:
    """One model, its caches, and the slots' sampling state."""

    def __init__(
        self,
        model: Runnable,
        caches: list[Tensor],
        block_table: npt.NDArray[np.int32],
        *,
        block_tokens: int,
        vocab_size: int,
        steps_in_flight: int = 2,
        threads: int | None = None,
        grammars: GrammarSource | None = None,
        predictor: Predictor | None = None,
    ) -> None:
        """`block_table` int32 [slots, blocks]: the scheduler's, shared. `threads`: of torch; None: its default.

        `predictor`: of `model`'s prediction layer, whose cache is the last of `caches`; None: it is not run.
        """
        self._model = model
        self._predictor = predictor
        self._caches = caches
        self._device = caches[0].device
        slots = block_table.shape[0]
        self._batches = BatchBuilder(block_table, block_tokens, self._device)
        self._sampler = Sampler(slots, vocab_size, self._device, grammars)
        self._last_token = torch.zeros(slots, dtype=torch.int64, device=self._device)  # [slots] sampled last
        self._queue: queue.Queue[Step | None] = queue.Queue(steps_in_flight + 1)
        self._threads = threads
        self._thread = threading.Thread(target=self._run, name="executor", daemon=True)
        self._thread.start()

    def launch(
        self,
        plan: Plan,
        requests: Mapping[int, SamplingParams],
        token_ids_of: Callable[[int], TokenIds | None],
        on_done: Callable[[], None],
    ) -> Step:
        """Queue `plan` behind the step that runs. `requests` and `token_ids_of` are asked for sequences it admits.

        `on_done` is called from the executor's thread when the step has ended, however it ended.
        """
        batch = self._batches.build(plan)
        work = self._sampler.prepare(plan, batch.sample_slots, batch.sample_ends, requests, token_ids_of)
        prediction = None if self._predictor is None else self._predictor.prepare(plan, batch)
        step = Step(plan.step, StepWork(batch, work, prediction), on_done)
        self._queue.put_nowait(step)  # full: more steps in flight than agreed, a programmer's error
        return step

    def close(self) -> None:
        """Let what was launched end, then the thread."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join(STEP_WAIT_MAX_S)
        self._sampler.close()

    # -- executor's thread --------------------------------------------------------------------------------------------
    def _run(self) -> None:
        if self._threads is not None:
            use_threads(self._threads)
        with torch.inference_mode():
            while (step := self._queue.get()) is not None:
                started = time.perf_counter_ns()
                try:
                    work = step.take()
                    token_ids, logprobs, proposals = self._forward(work)
                except Exception as error:  # the engine answers for it; the thread goes on with the next step
                    step.finish(None, error)
                else:
                    run_us = (time.perf_counter_ns() - started) // 1000 - (proposals.run_us if proposals else 0)
                    step.finish(StepResult(token_ids, logprobs, run_us, work.sampling.failures, proposals), None)
                    del work
                del step  # or its result would live until the next one comes

    def _forward(
        self, work: StepWork
    ) -> tuple[npt.NDArray[np.uint32], dict[int, TokenLogprobs] | None, Proposals | None]:
        batch, sampling = work.batch, work.sampling
        self._sampler.admit(sampling)  # a step that samples nothing admits as well
        token_ids = begin(batch, self._caches, self._last_token)
        logits, hidden = self._compute(batch)
        sampled, logprobs, proposals = token_ids.new_empty(0), None, None
        if len(batch.sample_slots):
            sampled, logprobs = self._sampler.run(sampling, logits)
            self._last_token[batch.sample_slots_device] = sampled
        if self._predictor is not None and hidden is not None and work.prediction is not None:
            proposals = self._predictor.run(work.prediction, batch, hidden, sampled, sampling.batch)
        return sampled.cpu().numpy().astype(np.uint32), logprobs, proposals

    def _compute(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Logits [s, V], and for a prediction layer what stands behind every token [t, d]."""
        if self._predictor is None:
            return self._model(batch.token_ids, batch.attention, self._caches, batch.sample_rows), None
        hidden = self._predictor.hidden(batch, self._caches)
        return self._predictor.logits(hidden[batch.sample_rows]), hidden

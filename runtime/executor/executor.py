"""Runs plans in order, in a thread of its own, behind the engine's.

    executor = Executor(model, caches, block_table, slots=64)
    step = executor.launch(plan, requests, token_ids_of, on_done=wake)      # returns at once
    result = step.wait()                                                    # raises what the step raised

The next plan is made while a step runs. What a step needs from the host is gathered by `launch`, in the caller's
thread, because the block table changes with the next plan; the token that a sequence sampled last stays on the device
and goes from step to step there. On a CPU a native call gathers it, and where the model is captured, and no row asks
for more than a token, another one runs the step from there to its tokens (kernels/step.py).
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokenrelay.base.errors import TokenRelayError
from tokenrelay.kernels.batch import AttentionBatch
from tokenrelay.kernels.step import HostSteps
from tokenrelay.libscheduler import Plan
from tokenrelay.runtime.executor.batch import Batch, BatchBuilder, batch_of, begin, copy_tails, shared, tails_of
from tokenrelay.runtime.executor.grammars import GrammarSource
from tokenrelay.runtime.executor.predictor import PredictionWork, Predictor, Proposals
from tokenrelay.runtime.executor.sampler import NOT_FINITE, Sampler, SampleWork
from tokenrelay.runtime.executor.threads import use_threads
from tokenrelay.runtime.requests import SamplingParams, TokenIds, TokenLogprobs

if TYPE_CHECKING:
    from tokenrelay.kernels._cpu import HostStep
    from tokenrelay.kernels.program import Program

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


@dataclass(slots=True)
class StepWork:
    """What a step runs: made when it is launched. It has `host`, `batch` or both."""

    sampling: SampleWork
    host: HostStep | None = None  # on a CPU: what a native call reads, and a batch is made of
    batch: Batch | None = None
    prediction: PredictionWork | None = None
    tails: tuple[tuple[int, int, int], ...] = ()  # of `host`


class Step:
    """A launched step."""

    def __init__(self, number: int, work: StepWork | None, on_done: Callable[[], None]) -> None:
        self.number = number
        self._work = work
        self._on_done = on_done
        self._done = False
        self._ended = threading.Lock()  # held until then: a tenth of what an Event costs
        self._ended.acquire()
        self._result: StepResult | None = None
        self._error: BaseException | None = None

    @property
    def done(self) -> bool:
        """Whether `wait` returns at once."""
        return self._done

    def wait(self, timeout_s: float = STEP_WAIT_MAX_S) -> StepResult:
        """What it sampled. Raises what it raised, or TokenRelayError when it does not end in time."""
        if not self._done:
            if not self._ended.acquire(timeout=timeout_s):
                raise TokenRelayError(f"step {self.number} did not end within {timeout_s} s")
            self._ended.release()  # for whoever waits as well
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
        self._done = True
        self._ended.release()
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
        self._steps = HostSteps.over(
            shared(block_table), block_tokens, self._sampler.settings, caches, self._last_token
        )
        self._captured: Callable[[], Program | None] | None = getattr(model, "captured", None)
        self._steps_max = steps_in_flight + 1
        self._queue: queue.SimpleQueue[Step | None] = queue.SimpleQueue()  # bounded by `launch`
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
        if self._queue.qsize() >= self._steps_max:  # more steps in flight than agreed, a programmer's error
            raise queue.Full(f"{self._steps_max} steps wait")
        work = self._work_of(plan, requests, token_ids_of)
        if self._predictor is not None:
            assert work.batch is not None, "a prediction layer reads tensors"
            work.prediction = self._predictor.prepare(plan, work.batch)
        step = Step(plan.step, work, on_done)
        self._queue.put(step)
        return step

    def _work_of(
        self, plan: Plan, requests: Mapping[int, SamplingParams], token_ids_of: Callable[[int], TokenIds | None]
    ) -> StepWork:
        if self._steps is None:
            batch = self._batches.build(plan)
            sampling = self._sampler.prepare(plan, batch.sample_slots, batch.sample_ends, requests, token_ids_of)
            return StepWork(sampling, batch=batch)
        sampling = self._sampler.admitted(plan, requests, token_ids_of)
        host = self._steps.make(
            plan.slots, plan.starts, plan.lengths, plan.samples, plan.feedback, plan.token_ids, plan.decodes
        )
        work = StepWork(sampling, host, tails=tails_of(plan))
        if host.special or self._predictor is not None or self._captured is None:
            work.batch = batch_of(self._steps, host, work.tails)
            sampling.batch, sampling.gathered = self._steps.sampling(host), True
            if host.special:
                self._sampler.ask(sampling, plan, work.batch.sample_slots, sampling.batch.position.numpy())
        return work

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
        if batch is None:
            assert work.host is not None and self._steps is not None
            program = self._program_for(work.host)
            if program is not None:
                copy_tails(self._caches, work.tails)
                chosen, broken = self._steps.run(program, work.host)
                if broken is not None:
                    sampling.failures = dict.fromkeys(broken, NOT_FINITE)
                return chosen, None, None
            batch = batch_of(self._steps, work.host, work.tails)
            sampling.batch, sampling.gathered = self._steps.sampling(work.host), True
        token_ids = begin(batch, self._caches, self._last_token)
        logits, hidden = self._compute(batch)
        sampled, logprobs, proposals = token_ids.new_empty(0), None, None
        if len(batch.sample_slots):
            sampled, logprobs = self._sampler.run(sampling, logits)
            self._last_token[batch.sample_slots_device] = sampled
        if self._predictor is not None and hidden is not None and work.prediction is not None:
            proposals = self._predictor.run(work.prediction, batch, hidden, sampled, sampling.batch)
        return sampled.cpu().numpy().astype(np.uint32), logprobs, proposals

    def _program_for(self, host: HostStep) -> Program | None:
        """What runs this step from feedback to tokens; None: the model and the sampler, one after the other."""
        program = None if self._captured is None else self._captured()
        if program is None or program.sampler is None or program.layers != len(self._caches):
            return None
        prompt_tokens = host.tokens - host.decodes
        takes = not prompt_tokens or program.takes_chunks(prompt_tokens, host.chunk_max, host.start_min)
        return program if takes else None

    def _compute(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Logits [s, V], and for a prediction layer what stands behind every token [t, d]."""
        if self._predictor is None:
            return self._model(batch.token_ids, batch.attention, self._caches, batch.sample_rows), None
        hidden = self._predictor.hidden(batch, self._caches)
        return self._predictor.logits(hidden[batch.sample_rows]), hidden

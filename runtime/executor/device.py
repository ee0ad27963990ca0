"""Runs plans on a device that works by itself: steps are queued on it in order, and the host waits for none of them.

    executor = DeviceExecutor(model, caches, block_table, …)      # as executor.Executor, and with its contract

Two threads: one puts steps into the device's queue (a recorded one where the step has one, see graphs.py, else kernel
by kernel), the other waits for their ends in order. So the device has its next step before it ends this one, and all
that a step brings back is one copy: its tokens, negative where the logits were no numbers. Rows with penalties, masks,
grammars or log-probabilities make a step wait in between: they are chosen with the host's help.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokenrelay.base.logging import get_logger
from tokenrelay.libscheduler import Plan
from tokenrelay.runtime.executor.batch import Batch, BatchBuilder, begin, rows_of
from tokenrelay.runtime.executor.executor import STEP_WAIT_MAX_S, Runnable, Step, StepResult
from tokenrelay.runtime.executor.grammars import GrammarSource
from tokenrelay.runtime.executor.graphs import Backend, Captures, DeviceGraphs, Staged, sampled_or_not
from tokenrelay.runtime.executor.predictor import PredictionWork, Predictor, Proposals
from tokenrelay.runtime.executor.recorded_predictor import Asked, proposals_of
from tokenrelay.runtime.executor.sampler import NOT_FINITE, Sampler, SampleWork
from tokenrelay.runtime.requests import SamplingParams, TokenIds, TokenLogprobs

log = get_logger("executor")


@dataclass(frozen=True, slots=True)
class _Apart:
    """A step that runs kernel by kernel."""

    batch: Batch
    prediction: PredictionWork | None


class _Step(Step):
    """A step that may be a replay."""

    def __init__(self, number: int, staged: Staged | _Apart, work: SampleWork, on_done: Callable[[], None]) -> None:
        super().__init__(number, None, on_done)
        self._staged: tuple[Staged | _Apart, SampleWork] | None = (staged, work)

    def take_staged(self) -> tuple[Staged | _Apart, SampleWork]:
        """What to run; given once, so that a finished step holds no tensors."""
        assert self._staged is not None, "a step runs once"
        staged, self._staged = self._staged, None
        return staged


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a prediction layer proposes behind a replay."""

    asked: Asked
    out: npt.NDArray[np.int64]  # [g, 1 + tokens] of the host, written before `wait` returns
    wait: Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Queued:
    """A step in the device's queue."""

    step: _Step
    began_ns: int
    wait: Callable[[], None]
    tokens: npt.NDArray[np.int64]  # [s] of the host, written before `wait` returns
    work: SampleWork
    logprobs: dict[int, TokenLogprobs] | None = None
    error: BaseException | None = None
    proposals: Proposals | None = None  # of a step that ran kernel by kernel
    answer: _Answer | None = None  # of a replay


class DeviceExecutor:
    """One model, its caches, and the slots' sampling state. See `executor.Executor`."""

    def __init__(
        self,
        model: Runnable,
        caches: list[Tensor],
        block_table: npt.NDArray[np.int32],
        *,
        block_tokens: int,
        vocab_size: int,
        steps_in_flight: int = 2,
        grammars: GrammarSource | None = None,
        draft_tokens: int = 0,
        backend: Backend | None = None,
        warm_up: bool = False,
        predictor: Predictor | None = None,
    ) -> None:
        """`block_table` int32 [slots, blocks]: the scheduler's, shared. `draft_tokens`: of one draft, at most.

        `predictor`: of `model`'s prediction layer, whose cache is the last of `caches`; None: it is not run.
        `warm_up`: record every size before the first step, rather than each when it first comes.
        """
        self._warm_up = warm_up
        self._model = model
        self._caches = caches
        self._device = caches[0].device
        self._backend = backend or DeviceGraphs(self._device)
        slots = block_table.shape[0]
        self._batches = BatchBuilder(block_table, block_tokens, self._device)
        self._sampler = Sampler(slots, vocab_size, self._device, grammars)
        self._last_token = torch.zeros(slots + 1, dtype=torch.int64, device=self._device)  # the last one: of padding
        self.captures = Captures(
            model,
            caches,
            block_table,
            self._last_token,
            block_tokens=block_tokens,
            steps_in_flight=steps_in_flight,
            draft_tokens=draft_tokens,
            backend=self._backend,
            predictor=predictor,
        )
        self._predictor = predictor
        sampled_max = slots * (1 + draft_tokens)
        self._results = [
            self._backend.host_bytes(8 * sampled_max).view(torch.int64) for _ in range(steps_in_flight + 2)
        ]
        answer = slots * (1 + predictor.tokens_max) if predictor is not None else 0
        self._answers = [self._backend.host_bytes(8 * answer).view(torch.int64) for _ in self._results]
        self._turn = 0
        self._queue: queue.Queue[_Step | None] = queue.Queue(steps_in_flight + 1)
        self._queued: queue.Queue[_Queued | None] = queue.Queue(steps_in_flight + 2)
        self._ended_ns = 0
        self._threads = [
            threading.Thread(target=run, name=name, daemon=True)
            for name, run in (("executor", self._run), ("executor-end", self._end))
        ]
        for thread in self._threads:
            thread.start()

    # -- engine's thread ----------------------------------------------------------------------------------------------
    def launch(
        self,
        plan: Plan,
        requests: Mapping[int, SamplingParams],
        token_ids_of: Callable[[int], TokenIds | None],
        on_done: Callable[[], None],
    ) -> Step:
        """See `executor.Executor.launch`."""
        rows = rows_of(plan)
        staged: Staged | _Apart
        if self.captures.takes(rows) and not len(plan.tail_tokens):
            slots, ends = rows.slots.astype(np.int64), (rows.starts + rows.lengths).astype(np.int64)
            work = self._sampler.prepare(plan, slots, ends, requests, token_ids_of, captured=True)
            staged = self.captures.stage(rows, plan, self._sampler) if not work.gathered else self._apart(plan)
        else:
            staged = self._apart(plan)
            ends = staged.batch.sample_ends
            work = self._sampler.prepare(plan, staged.batch.sample_slots, ends, requests, token_ids_of)
        step = _Step(plan.step, staged, work, on_done)
        self._queue.put_nowait(step)  # full: more steps in flight than agreed, a programmer's error
        return step

    def _apart(self, plan: Plan) -> _Apart:
        batch = self._batches.build(plan)
        return _Apart(batch, None if self._predictor is None else self._predictor.prepare(plan, batch))

    def close(self) -> None:
        """Let what was launched end, then the threads."""
        if self._threads[0].is_alive():
            self._queue.put(None)
            for thread in self._threads:
                thread.join(STEP_WAIT_MAX_S)
        self._sampler.close()

    # -- the thread that fills the device's queue ---------------------------------------------------------------------
    def _run(self) -> None:
        if self._device.type != "cpu":
            torch.cuda.set_device(self._device)
        none = np.zeros(0, np.int64)
        with torch.inference_mode():
            if self._warm_up:
                self._record_all()
            while (step := self._queue.get()) is not None:
                began_ns = time.perf_counter_ns()
                staged, work = step.take_staged()
                try:
                    queued = self._enqueue(step, staged, work, began_ns)
                except Exception as error:  # the engine answers for it; the thread goes on with the next step
                    queued = _Queued(step, began_ns, lambda: None, none, work, error=error)
                self._queued.put(queued)
                del step, staged, work, queued
        self._queued.put(None)

    def _record_all(self) -> None:
        try:
            self.captures.warm_up()
        except Exception as error:  # no memory for all: each is recorded when it comes, or runs by itself
            log.warning("not all decode steps could be recorded ahead", error=repr(error))

    def _enqueue(self, step: _Step, staged: Staged | _Apart, work: SampleWork, began_ns: int) -> _Queued:
        self._sampler.admit(work)  # a step that samples nothing admits as well
        logprobs, proposals = None, None
        if isinstance(staged, Staged):
            told: Tensor | None = self.captures.run(staged)
        else:
            told, logprobs, proposals = self._forward(staged, work)
        if told is None:
            return _Queued(step, began_ns, self._backend.mark(), np.zeros(0, np.int64), work, proposals=proposals)
        self._turn = (self._turn + 1) % len(self._results)
        host = self._results[self._turn][: told.shape[0]]
        host.copy_(told, non_blocking=True)
        wait, answer = self._backend.mark(), None
        if isinstance(staged, Staged) and (out := self.captures.ask(staged)) is not None:
            assert staged.asked is not None
            copy = self._answers[self._turn][: out.numel()].view(out.shape)
            copy.copy_(out, non_blocking=True)
            answer = _Answer(staged.asked, copy.numpy(), self._backend.mark())
        return _Queued(step, began_ns, wait, host.numpy(), work, logprobs, proposals=proposals, answer=answer)

    def _forward(
        self, apart: _Apart, work: SampleWork
    ) -> tuple[Tensor | None, dict[int, TokenLogprobs] | None, Proposals | None]:
        """Kernel by kernel. What is sampled, as `sampled_or_not` says; None: nothing is."""
        batch, predictor = apart.batch, self._predictor
        token_ids = begin(batch, self._caches, self._last_token)
        hidden = None
        if predictor is None:
            logits = self._model(token_ids, batch.attention, self._caches, batch.sample_rows)
        else:
            hidden = predictor.hidden(batch, self._caches)
            logits = predictor.logits(hidden[batch.sample_rows])
        told, logprobs, tokens = None, None, token_ids.new_empty(0)
        if len(batch.sample_slots):
            if work.special:
                tokens, logprobs = self._sampler.run(work, logits)
                told = tokens
            else:
                tokens, told = sampled_or_not(logits, work.batch)
            self._last_token[batch.sample_slots_device] = tokens
        if predictor is None or hidden is None or apart.prediction is None:
            return told, logprobs, None
        return told, logprobs, predictor.run(apart.prediction, batch, hidden, tokens, work.batch)

    # -- the thread that waits for the device -------------------------------------------------------------------------
    def _end(self) -> None:
        while (queued := self._queued.get()) is not None:
            try:
                if queued.error is not None:
                    raise queued.error
                queued.wait()
                result = self._result(queued)
            except Exception as error:  # the engine answers for it
                queued.step.finish(None, error)
            else:
                queued.step.finish(result, None)
                del result
            del queued

    def _result(self, queued: _Queued) -> StepResult:
        now_ns, proposals, answer = time.perf_counter_ns(), queued.proposals, queued.answer
        run_us = (now_ns - max(queued.began_ns, self._ended_ns)) // 1000  # without waiting for the step before
        if proposals is not None:
            run_us = max(0, run_us - proposals.run_us)
        if answer is not None:
            answer.wait()
            proposals = proposals_of(answer.asked, answer.out, (time.perf_counter_ns() - now_ns) // 1000)
            now_ns = time.perf_counter_ns()
        self._ended_ns = now_ns
        broken = queued.tokens < 0
        failures = dict(queued.work.failures)
        failures |= dict.fromkeys(np.flatnonzero(broken).tolist(), NOT_FINITE)
        token_ids = np.where(broken, -1 - queued.tokens, queued.tokens).astype(np.uint32)
        return StepResult(token_ids, queued.logprobs, run_us, failures, proposals)

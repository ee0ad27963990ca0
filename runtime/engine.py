"""The step loop: take events, commit what ended, plan and launch what is next, publish. It knows no role.
    engine = Engine(scheduler, executor, vocab_size=…, on_step=deliver)
    engine.start()
    engine.submit(EngineRequest(sequence_id=1, token_ids=…, output_start=…, tokens_max=64))
    engine.abort(1)

The loop runs in a thread of its own and sleeps on one condition, which submit, abort and the end of a step wake. One
plan is made ahead: while step N runs, N + 1 is planned and queued. `on_step(outputs, stats)` is called from that
thread, at most once per turn of the loop. Every accepted sequence gets exactly one output with a `finish`, whatever
fails.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tokenrelay.base.deadlines import Deadline
from tokenrelay.base.errors import DeadlineExceeded, InvalidRequest, Overloaded, TokenRelayError, Unavailable
from tokenrelay.base.logging import get_logger
from tokenrelay.libscheduler import Outcome, Plan, Scheduler
from tokenrelay.runtime.bell import Bell
from tokenrelay.runtime.counting import count
from tokenrelay.runtime.drafts import Drafter
from tokenrelay.runtime.executor.executor import Step, StepResult
from tokenrelay.runtime.explain import Answer, Questions
from tokenrelay.runtime.floor_watch import FloorWatch
from tokenrelay.runtime.handover import HandoverPort, OnHandover
from tokenrelay.runtime.host_tier import TierPort
from tokenrelay.runtime.integrity import Books
from tokenrelay.runtime.refusals import refused
from tokenrelay.runtime.requests import (
    EngineOutput,
    EngineRequest,
    EngineStats,
    Finish,
    Reject,
    SamplingParams,
    TokenIds,
)
from tokenrelay.runtime.waits import Waits

log = get_logger("engine")

Commands = tuple[list[EngineRequest], dict[int, TokenRelayError | None], list[Callable[[], None]]]
OnStep = Callable[[list[EngineOutput], EngineStats], None]
STEP_MAX_S = 600.0  # a step that runs longer hangs: the engine gives up, its process is started anew


class Launcher(Protocol):
    """The executor, as the loop drives it."""

    def launch(
        self,
        plan: Plan,
        requests: Any,
        token_ids_of: Callable[[int], TokenIds | None],
        on_done: Callable[[], None],
    ) -> Step:
        """Queue a plan; returns at once."""

    def close(self) -> None:
        """Let what was launched end."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Bounds of the loop."""

    commands_max: int = 2048  # submitted and not yet seen by the loop
    steps_in_flight: int = 2  # as the scheduler's
    tps_floor: float = 0.0  # as the scheduler's
    draft_tokens: int = 0  # as the scheduler's


@dataclass(slots=True)
class _Launched:
    """A step on its way."""

    step: Step
    plan: Plan
    at_s: float = field(default_factory=time.monotonic)


class Engine:
    """One scheduler and one executor. submit, abort, drain, close and stats are for any thread."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Launcher,
        *,
        vocab_size: int,
        on_step: OnStep,
        on_fatal: Callable[[BaseException], None] | None = None,
        on_cache_events: Callable[[list[tuple[str, bytes]]], None] | None = None,
        on_handover: OnHandover | None = None,
        options: EngineOptions | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        """`drafter`: who guesses; None: the sequences' own texts, as far as `options` allows."""
        self._scheduler = scheduler
        self._executor = executor
        self._vocab_size = vocab_size
        self._on_step = on_step
        self._on_fatal = on_fatal
        self._on_cache_events = on_cache_events
        self._on_handover = on_handover
        self.handover = HandoverPort(scheduler, self._post)
        self.tier = TierPort(scheduler, self._post)
        self._options = options or EngineOptions()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        # Shared, under the condition.
        self._lock = threading.Lock()
        self._bell = Bell()  # the loop sleeps here, and nobody else
        self._quiet = threading.Condition(self._lock)  # drain sleeps here until nothing is owed
        self._submitted: deque[EngineRequest] = deque()
        self._aborts: dict[int, TokenRelayError | None] = {}  # of accepted sequences only, so bounded by them
        self._posted: deque[Callable[[], None]] = deque()  # a few per sequence or handle, so bounded by them
        self._accepted: set[int] = set()  # owed one terminal output
        self._questions = Questions()
        self._step_ended = False
        self._draining = False
        self._closing = False
        self._dead: TokenRelayError | None = None
        # The loop's own.
        self._open: dict[int, EngineRequest] = {}  # in the scheduler
        self._params: dict[int, SamplingParams] = {}  # of `_open`, as the executor asks for it
        self._waits = Waits()
        self._deadlines: list[tuple[float, int]] = []  # heap of (instant, sequence); entries of ended ones are skipped
        self._launched: deque[_Launched] = deque()
        self._step_time_us = 0
        self._steps = 0
        self._books = Books(scheduler.check)
        self._drafter = drafter or Drafter(scheduler, tokens_max=self._options.draft_tokens)
        self._stats = EngineStats()
        self._floor_watch = FloorWatch()

    # -- any thread ---------------------------------------------------------------------------------------------------
    def start(self) -> None:
        """Begin to run."""
        self._stats = self._count()
        self._thread.start()

    def submit(self, request: EngineRequest) -> None:
        """Accept a sequence: exactly one terminal output follows through `on_step`.

        Raises Overloaded when the loop lags behind, Unavailable when it drains or is dead, InvalidRequest for an id
        that is open; nothing follows then.
        """
        with self._lock:
            if self._dead is not None or self._closing or self._draining:
                raise self._dead or Unavailable("the engine drains")
            if len(self._submitted) >= self._options.commands_max:
                raise Overloaded(f"{len(self._submitted)} requests wait for the engine")
            if request.sequence_id in self._accepted:
                raise InvalidRequest(f"sequence {request.sequence_id} is open")
            self._accepted.add(request.sequence_id)
            self._submitted.append(request)
            self._bell.ring()

    def abort(self, sequence_id: int, error: TokenRelayError | None = None) -> None:
        """End a sequence: its terminal output comes at once, unless it has ended already. `error`: not as asked."""
        with self._lock:
            if sequence_id in self._accepted:
                self._aborts.setdefault(sequence_id, error)
                self._bell.ring()

    def explain(self, request_id: str = "") -> Future[Answer]:
        """Why the sequences of a request, or all open ones, are where they are. Raises Overloaded, Unavailable."""
        with self._lock:
            if self._dead is not None or self._closing:
                raise self._dead or Unavailable("the engine is closed")
            future = self._questions.ask(request_id)
            self._bell.ring()
            return future

    def _post(self, work: Callable[[], None]) -> None:
        with self._lock:  # run between two turns of the loop, behind submits and aborts that came before
            if self._dead is None and not self._closing:
                self._posted.append(work)
                self._bell.ring()

    @property
    def stats(self) -> EngineStats:
        """Counters as of the last turn of the loop."""
        return self._stats

    def drain(self, deadline: Deadline) -> bool:
        """Refuse what is new and wait until nothing is open. False when that did not happen before the deadline."""
        with self._lock:
            self._draining = True
            timeout_s = None if deadline.at_s == float("inf") else deadline.left_s()
            return self._quiet.wait_for(lambda: not self._accepted or self._dead is not None, timeout_s)

    def close(self) -> None:
        """Stop after the steps in flight; whatever is open gets an error. Idempotent."""
        with self._lock:
            self._closing = True
            self._bell.ring()
        if self._thread.is_alive():
            self._thread.join()
        self._executor.close()

    # -- the loop -----------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            while (commands := self._next_commands()) is not None:
                outputs: list[EngineOutput] = []
                self._take(*commands, outputs)
                self._expire(outputs)
                self._commit_ended(outputs)
                self._launch_next()
                self._publish(outputs)
            self._close_down()
        except BaseException as error:
            log.exception("the engine's loop failed; it does not go on", steps=self._steps)
            self._end_open(TokenRelayError(f"the engine failed: {error!r}"))
            if self._on_fatal is not None:
                self._on_fatal(error)

    def _next_commands(self) -> Commands | None:
        """Sleep until a command came, a step ended or a deadline passed; None when closing."""
        while True:
            with self._lock:
                self._bell.quiet()
                if self._closing:
                    return None
                timeout_s = self._sleep_max_s()
                if self._submitted or self._aborts or self._posted or self._step_ended or timeout_s == 0.0:
                    self._step_ended = False
                    # Taken together, or an abort could overtake its submit.
                    commands = list(self._submitted), self._aborts, list(self._posted)
                    self._submitted.clear()
                    self._posted.clear()
                    self._aborts = {}
                    self._books.touched()
                    return commands
                idle = not self._open and not self._launched
                check_s = self._books.due_s() if idle else None
                sleeps = check_s != 0.0 and not self._questions
            if sleeps:
                waits = [wait_s for wait_s in (timeout_s, check_s) if wait_s is not None]
                self._bell.wait(min(waits, default=None))
                continue
            if self._questions:
                self._questions.answer(self._scheduler, self._open)
            else:
                self._check_books()

    def _check_books(self) -> None:
        """While idle. A failure is counted and told before it ends the loop."""
        try:
            self._books.check()
        finally:
            self._stats = self._count()
            if self._books.failures:
                self._on_step([], self._stats)

    def _sleep_max_s(self) -> float | None:
        """Until the next deadline, or until the running step must have ended; None: for ever."""
        if self._launched and not self._launched[0].step.done:
            left_s = self._launched[0].at_s + STEP_MAX_S - time.monotonic()
            if left_s <= 0:
                raise TokenRelayError(f"step {self._launched[0].plan.step} did not end within {STEP_MAX_S} s")
        else:
            left_s = float("inf")
        if (copy_s := self.tier.left_s()) is not None:
            left_s = min(left_s, copy_s)
        if self._deadlines:
            left_s = min(left_s, max(0.0, self._deadlines[0][0] - time.monotonic()))
        return None if left_s == float("inf") else left_s

    def _wake_up(self) -> None:
        """From the executor's thread: a step has ended."""
        with self._lock:
            self._step_ended = True
            self._bell.ring()

    def _take(
        self,
        submitted: list[EngineRequest],
        aborts: dict[int, TokenRelayError | None],
        posted: list[Callable[[], None]],
        outputs: list[EngineOutput],
    ) -> None:
        """Submits first: an abort of one of them finds it."""
        for request in submitted:
            refusal = self._submit(request)
            if refusal is not None:
                outputs.append(refusal)
        for sequence_id, error in aborts.items():
            if sequence_id in self._open:
                outputs.append(self._abort_with(sequence_id, error))
        for work in posted:
            work()

    def _submit(self, request: EngineRequest) -> EngineOutput | None:
        problem = request.problem(self._vocab_size)
        if problem is not None:
            return self._refusal(request.sequence_id, Reject.INVALID, InvalidRequest(problem))
        answer = self._scheduler.submit(
            request.sequence_id,
            request.token_ids,
            output_start=request.output_start,
            tokens_max=request.tokens_max,
            stop_token_ids=request.stop_token_ids,
            priority=request.priority,
            salt=request.salt,
            tenant=request.tenant,
            parent=request.parent,
            parent_tokens=None if request.parent is None else request.parent_tokens,
            tools=request.tools,
            expected_tokens=request.expected_tokens,
            tps_floor=request.tps_floor,
            handover=request.handover,
            now_us=_now_us(),
        )
        if answer is not None:
            return self._refusal(request.sequence_id, *refused(answer))
        self._open[request.sequence_id] = request
        self._params[request.sequence_id] = request.sampling
        self._drafter.opened(request)
        self._waits.submitted(request.sequence_id)
        self.handover.submitted(request.sequence_id, request.handover)
        if request.deadline.at_s != float("inf"):
            self._remember_deadline(request)
        return None

    def _expire(self, outputs: list[EngineOutput]) -> None:
        """Abort what is past its deadline."""
        now_s = time.monotonic()
        while self._deadlines and self._deadlines[0][0] <= now_s:
            _, sequence_id = heapq.heappop(self._deadlines)
            request = self._open.get(sequence_id)
            if request is not None and request.deadline.passed:
                error = DeadlineExceeded("the request was not done before its deadline")
                outputs.append(self._abort_with(sequence_id, error))

    def _commit_ended(self, outputs: list[EngineOutput]) -> None:
        while self._launched and self._launched[0].step.done:
            launched = self._launched.popleft()
            try:
                result = launched.step.wait()
            except Exception as error:
                self._commit_failed(launched, error, outputs)
            else:
                self._commit(launched, result, outputs)

    def _commit(self, launched: _Launched, result: StepResult, outputs: list[EngineOutput]) -> None:
        outcome = self._scheduler.commit(launched.plan.step, result.token_ids, _now_us(), result.run_us)
        self._steps += 1
        self._step_time_us += result.run_us
        self.handover.touch(launched.plan.sequence_ids.tolist())
        self._drafter.committed(launched.plan, outcome, result.proposals)
        self._collect(outcome, result, outputs)

    def _collect(self, outcome: Outcome, result: StepResult, outputs: list[EngineOutput]) -> None:
        """What a step brought, as one output for each sequence: tokens of a draft follow each other."""
        last: EngineOutput | None = None
        logprobs, failures = result.logprobs, result.failures
        for sequence_id, token_id, finish, row, first, cached_tokens in zip(
            outcome.sequence_ids.tolist(),
            outcome.token_ids.tolist(),
            outcome.finish.tolist(),
            outcome.rows.tolist(),
            outcome.first.tolist(),
            outcome.cached_tokens.tolist(),
            strict=True,
        ):
            if failures and row in failures:
                outputs.append(self._failed_row(sequence_id, failures[row], ended=bool(finish)))
                continue
            output = last
            if output is None or output.sequence_id != sequence_id:
                output = last = EngineOutput(sequence_id, (token_id,), _NO_FINISH, bool(first), cached_tokens)
                if first:
                    output.waited_us = self._waits.take(sequence_id)
                outputs.append(output)
            else:
                output.token_ids = (*output.token_ids, token_id)
            if logprobs is not None and row in logprobs:
                output.logprobs = (*(output.logprobs or ()), logprobs[row])
            if finish:
                output.finish = _FINISHES[finish]
                self._ended(output)

    def _commit_failed(self, launched: _Launched, error: Exception, outputs: list[EngineOutput]) -> None:
        """A step raised: its sequences end with an error, and nothing it may have written is ever read.

        They are aborted before the step is committed, so that the scheduler frees the blocks it wrote unsealed.
        """
        log.error("a step failed", step=launched.plan.step, error=repr(error))
        failure = TokenRelayError(f"step {launched.plan.step} failed: {type(error).__name__}: {error}"[:500])
        for sequence_id in launched.plan.sequence_ids.tolist():
            if sequence_id in self._open:
                outputs.append(self._abort_with(sequence_id, failure))
        self._scheduler.commit(launched.plan.step, np.zeros(launched.plan.sampled, np.uint32), _now_us(), 0)
        self._steps += 1

    def _launch_next(self) -> None:
        self._drafter.propose()
        while len(self._launched) < self._options.steps_in_flight:
            plan = self._scheduler.plan(_now_us())
            self.tier.turn()
            if plan is None:
                return
            admitted = plan.admitted_ids.tolist()
            self.handover.touch(admitted)
            self._waits.admitted(admitted)
            step = self._executor.launch(plan, self._params, self._token_ids_of, self._wake_up)
            self._launched.append(_Launched(step, plan))

    def _publish(self, outputs: list[EngineOutput]) -> None:
        self._stats = self._count()
        self._floor_watch.look(self._stats.floor, self._stats.sequences_running)
        if self._on_cache_events is not None and (events := self._scheduler.take_cache_events()):
            self._on_cache_events(events)
        if notices := self.handover.notices(self._open.__contains__):
            assert self._on_handover is not None, "a sequence is handed over, and nobody listens"
            self._on_handover(notices)
        if outputs:
            self._on_step(outputs, self._stats)

    # -- ends ---------------------------------------------------------------------------------------------------------
    def _ended(self, output: EngineOutput) -> EngineOutput:
        """Note that this is the one terminal output of its sequence."""
        sequence_id = output.sequence_id
        self._open.pop(sequence_id, None)
        self._params.pop(sequence_id, None)
        self._drafter.ended(sequence_id)
        self._waits.forget(sequence_id)
        with self._lock:
            assert sequence_id in self._accepted, f"a second terminal output for sequence {sequence_id}"
            self._accepted.discard(sequence_id)
            self._aborts.pop(sequence_id, None)
            if not self._accepted:
                self._quiet.notify_all()
        return output

    def _refusal(self, sequence_id: int, reject: Reject, error: TokenRelayError) -> EngineOutput:
        return self._ended(EngineOutput(sequence_id, finish=Finish.REJECTED, reject=reject, error=error))

    def _failed_row(self, sequence_id: int, reason: str, *, ended: bool) -> EngineOutput:
        """One row of a step could not be sampled; its token is none."""
        error = TokenRelayError(reason)
        if ended:
            return self._ended(EngineOutput(sequence_id, finish=Finish.ERROR, error=error))
        return self._abort_with(sequence_id, error)

    def _abort_with(self, sequence_id: int, error: TokenRelayError | None) -> EngineOutput:
        self._scheduler.abort(sequence_id, _now_us())
        finish = Finish.ABORT if error is None else Finish.ERROR
        return self._ended(EngineOutput(sequence_id, finish=finish, error=error))

    def _end_open(self, error: TokenRelayError) -> None:
        """The loop is over: whoever is still owed an answer gets `error`."""
        with self._lock:
            self._dead = error
            owed = sorted(self._accepted)
            self._submitted.clear()
            self._questions.fail(error)
        outputs = [self._ended(EngineOutput(sequence_id, finish=Finish.ERROR, error=error)) for sequence_id in owed]
        if outputs:
            self._on_step(outputs, self._stats)

    def _close_down(self) -> None:
        """End what is open, let the launched steps end and commit them: the scheduler's books are complete then."""
        for sequence_id in self._open:
            self._scheduler.abort(sequence_id, _now_us())
        self._end_open(Unavailable("the engine was closed"))
        self._executor.close()
        for launched in self._launched:
            self._scheduler.commit(launched.plan.step, np.zeros(launched.plan.sampled, np.uint32), _now_us())
        self._launched.clear()
        self.tier.close()
        self._stats = self._count()

    # -- small things -------------------------------------------------------------------------------------------------
    def _token_ids_of(self, sequence_id: int) -> TokenIds | None:
        token_ids: npt.NDArray[np.uint32] | None = self._scheduler.token_ids(sequence_id)
        return token_ids

    def _remember_deadline(self, request: EngineRequest) -> None:
        if len(self._deadlines) > 2 * len(self._open) + 1024:  # mostly of sequences that ended long before theirs
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self._open]
            heapq.heapify(self._deadlines)
        heapq.heappush(self._deadlines, (request.deadline.at_s, request.sequence_id))

    def _count(self) -> EngineStats:
        return count(
            self._scheduler,
            self._books,
            steps=self._steps,
            step_time_us=self._step_time_us,
            tps_floor=self._options.tps_floor,
            block_bytes=self.tier.block_bytes,
            proposer=self._drafter.proposer,
        )


_NO_FINISH = Finish.NONE
_FINISHES = tuple(Finish)  # by number: calling the enumeration costs more than all else of an output


def _now_us() -> int:
    return time.monotonic_ns() // 1000

"""libscheduler as the engine drives it: two plans are launched at once, arrays are read without a copy, and the TPS
floor is at its default of 70 tokens/s, on a device whose steps take some 8 ms: the cost model learns at each commit."""

from __future__ import annotations

import time

import numpy as np
from protocol import BLOCK_TOKENS, SESSIONS, Case, serve, tokens

from tokenrelay.libscheduler import Config, Plan, Scheduler

PLAN_ARRAYS = ("sequence_ids", "slots", "starts", "lengths", "token_ids", "feedback", "samples", "admitted_ids")
STEP_US, TOKEN_US = 8_000, 2  # what the device takes
OUTCOME_ARRAYS = ("sequence_ids", "token_ids", "finish", "rows", "first", "cached_tokens")


class Ours:
    """The binding of this checkout."""

    version = "this checkout"

    def prepare(self, case: Case) -> None:
        self._case = case
        self._ids = 0
        self._now_us = 0
        self._launched: list[Plan] = []
        self._sessions: list[tuple[int, np.ndarray]] = []  # ids of those that ended, and what comes next
        self._scheduler = Scheduler(
            Config(
                block_tokens=BLOCK_TOKENS,
                blocks=case.blocks,
                slots=max(case.sequences, 1) + 1,
                context_tokens=65_536,
                step_tokens=case.step_tokens,
                chunk_tokens=case.step_tokens,
                hash_key=bytes(range(16)),
                model_identity=bytes(16),
                steps_in_flight=2 if case.kind == "decode" else 1,
                tps_floor=70.0,
            )
        )
        if case.full:
            self._fill()
        for n in range(case.sequences):
            self._submit(tokens(case.context_of(n)), case.output)
        self._settle()
        for _ in range(case.waiting):
            self._submit(tokens(case.prompt), case.output)
        if case.kind == "admit":
            self._prefix = tokens(case.cached)
            self._submit([*self._prefix, 1], 1)
            self._settle()
        elif case.kind == "decode":
            self._launch()  # one step is in flight while the next one is planned

    def sample(self) -> tuple[float, float, float]:
        case = self._case
        began = time.thread_time()
        if case.kind == "admit":
            prompt = np.array([*self._prefix, *tokens(case.prompt - case.cached)], np.uint32)
            began = time.thread_time()
            self._submit(prompt, 2)
        elif case.kind == "turn":
            began = self._next_turn()
        submitted = time.thread_time()
        plan = self._launch()
        planned = time.thread_time()
        sampled = np.full(case.sequences or 1, 11, np.uint32)
        self._now_us += STEP_US + TOKEN_US * len(plan.token_ids)
        applying = time.thread_time()
        outcome = self._scheduler.commit(self._launched.pop(0).step, sampled, self._now_us, STEP_US)
        for name in OUTCOME_ARRAYS:
            getattr(outcome, name)
        applied = time.thread_time()
        rows = case.sequences or 1
        assert len(plan.lengths) == rows and len(outcome.rows) == rows, "another number of rows than the case has"
        if case.kind != "decode":
            self._scheduler.abort(self._ids, self._now_us)
            assert plan.lengths.sum() < 4 * BLOCK_TOKENS + max(case.prompt - case.cached, case.appended)
        return submitted - began, planned - submitted, applied - applying

    def _next_turn(self) -> float:
        """The next turn of a session that ended names it, and brings what it appends. When that began."""
        if not self._sessions:
            for _ in range(SESSIONS):
                self._submit(tokens(self._case.prompt - 1), 1)
                self._settle()
                self._sessions.insert(0, (self._ids, np.array(tokens(self._case.appended), np.uint32)))
        parent, appended = self._sessions.pop()
        began = time.thread_time()
        self._submit(appended, 2, parent=parent, output_start=self._case.prompt + self._case.appended)
        return began

    def _submit(
        self,
        token_ids: list[int] | np.ndarray,
        output_max: int,
        parent: int | None = None,
        output_start: int | None = None,
    ) -> None:
        if isinstance(token_ids, list):
            token_ids = np.array(token_ids, np.uint32)
        self._ids += 1
        refused = self._scheduler.submit(
            self._ids,
            token_ids,
            output_start=output_start or len(token_ids),
            tokens_max=output_max,
            parent=parent,
            now_us=self._now_us,
        )
        assert refused is None, refused

    def _launch(self) -> Plan:
        plan = self._scheduler.plan(self._now_us)
        assert plan is not None, "nothing can run"
        for name in PLAN_ARRAYS:
            getattr(plan, name)
        self._launched.append(plan)
        return plan

    def _settle(self) -> None:
        """Run until every prompt is computed."""
        while (plan := self._scheduler.plan(self._now_us)) is not None:
            ran_us = STEP_US + TOKEN_US * len(plan.token_ids)
            self._now_us += ran_us
            self._scheduler.commit(plan.step, np.full(int(plan.samples.sum()), 11, np.uint32), self._now_us, ran_us)
            if plan.decodes == len(plan.lengths) == self._case.sequences:
                break

    def _fill(self) -> None:
        """The whole pool becomes cache; what is submitted later takes its blocks from there."""
        size = 32_768
        for _ in range(self._case.blocks * BLOCK_TOKENS // size + 1):
            self._submit(tokens(size), 1)
            self._settle()
        assert self._scheduler.counts().blocks_free == 0


if __name__ == "__main__":
    serve(Ours)

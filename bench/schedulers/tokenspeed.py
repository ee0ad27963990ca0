"""tokenspeed-scheduler: `submit_requests`, `next_execution_plan` with its block tables as arrays, `advance`.

To make a RequestSpec copies a list of ints into C++; that is left out of its time, as an engine may have it ready.
"""

from __future__ import annotations

import time
from importlib import metadata
from typing import Any

import tokenspeed_scheduler as ts
from protocol import BLOCK_TOKENS, SESSIONS, Case, serve, tokens


class TokenSpeed:
    """One full-attention cache group, no host tier, no overlap."""

    version = metadata.version("tokenspeed-scheduler")

    def prepare(self, case: Case) -> None:
        self._case = case
        self._ids = 0
        self._sessions: list[list[int]] = []  # what those that ended held
        config = ts.SchedulerConfig()
        config.prefix_granularity = BLOCK_TOKENS
        config.max_scheduled_tokens = case.step_tokens
        config.max_batch_size = 512
        config.num_device_pages = case.blocks
        config.num_host_pages = config.num_snapshot_pages = 1
        config.disable_l2_cache = True
        config.overlap_schedule_depth = 0
        config.enable_kv_cache_events = False
        config.cache_groups = [
            ts.CacheGroupConfig(
                group_id="full_attention",
                block_granularity=BLOCK_TOKENS,
                total_pages=case.blocks,
                attn_kind=ts.AttnKind.Full,
            )
        ]
        self._scheduler = ts.Scheduler(config)
        if case.full:
            self._fill()
        for n in range(case.sequences):
            self._scheduler.submit_requests([self._spec(tokens(case.context_of(n)), case.output)])
        self._settle()
        self._scheduler.submit_requests([self._spec(tokens(case.prompt), case.output) for _ in range(case.waiting)])
        if case.kind == "admit":
            self._prefix = tokens(case.cached)
            self._run_one([*self._prefix, 1])

    def sample(self) -> tuple[float, float, float]:
        case = self._case
        spec = None
        if case.kind == "admit":
            spec = self._spec([*self._prefix, *tokens(case.prompt - case.cached)], 2)
        elif case.kind == "turn":
            if not self._sessions:
                self._sessions = [tokens(case.prompt - 1) for _ in range(SESSIONS)]
                for session in reversed(self._sessions):
                    self._run_one(session)
            spec = self._spec([*self._sessions.pop(), 11, *tokens(case.appended)], 2)
        began = time.thread_time()
        if spec is not None:
            self._scheduler.submit_requests([spec])
        submitted = time.thread_time()
        operation = self._scheduler.next_execution_plan().forward[0]
        ids, _, lengths = operation.request_ids, operation.block_tables_arrays(), operation.input_lengths
        planned = time.thread_time()
        self._advance([(request_id, [11]) for request_id in ids])
        applied = time.thread_time()
        assert len(ids) == (case.sequences or 1), "another number of rows than the case has"
        if spec is not None:
            assert next(iter(lengths)) < 4 * BLOCK_TOKENS + max(case.prompt - case.cached, case.appended)
            self._advance([], finished=list(ids))
        return submitted - began, planned - submitted, applied - planned

    def _spec(self, token_ids: list[int], output_max: int) -> Any:
        self._ids += 1
        spec = ts.RequestSpec()
        spec.request_id, spec.tokens, spec.max_new_tokens = f"r{self._ids}", token_ids, output_max
        return spec

    def _advance(self, sampled: list[tuple[str, list[int]]], finished: list[str] | tuple[()] = ()) -> None:
        event = ts.ExecutionEvent()
        for request_id, token_ids in sampled:
            result = ts.ForwardEvent.ExtendResult()
            result.request_id, result.tokens = request_id, token_ids
            event.add_event(result)
        for request_id in finished:
            finish = ts.ForwardEvent.Finish()
            finish.request_id = request_id
            event.add_event(finish)
        self._scheduler.advance(event)

    def _settle(self) -> None:
        """Run until every prompt is computed."""
        while self._scheduler.waiting_size() or self._scheduler.prefilling_size():
            operations = list(self._scheduler.next_execution_plan().forward)
            assert operations, "nothing can run"
            for operation in operations:
                ids, extends = list(operation.request_ids), operation.num_extends()
                ends = [a + b for a, b in zip(operation.extend_prefix_lens, operation.input_lengths, strict=False)]
                goals = list(operation.prefill_lengths)
                done = [n >= extends or ends[n] >= goals[n] for n in range(len(ids))]
                self._advance([(ids[n], [7] if done[n] else []) for n in range(len(ids))])

    def _run_one(self, token_ids: list[int]) -> None:
        spec = self._spec(token_ids, 2)
        self._scheduler.submit_requests([spec])
        self._settle()
        self._advance([], finished=[spec.request_id])

    def _fill(self) -> None:
        """The whole pool becomes cache; what is submitted later takes its blocks from there."""
        size = 32_768
        for _ in range(self._case.blocks * BLOCK_TOKENS // size + 1):
            self._run_one(tokens(size))
        assert self._scheduler.empty_lcm_blocks() < size // BLOCK_TOKENS


if __name__ == "__main__":
    serve(TokenSpeed)

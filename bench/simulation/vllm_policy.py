"""vLLM's V1 scheduler and KV-cache manager in the simulation of bench/replay.py: the real objects, without a model."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "schedulers"))

from core import BLOCK_TOKENS, CONTEXT_TOKENS, Emitted, Step, serve
from device import Device
from vllm_v1 import Request as VllmRequest
from vllm_v1 import SamplingParams, make_hasher, make_scheduler, sampled_of
from workload import Request


class Vllm:
    """`settings`: `step_tokens` is its max_num_batched_tokens, `slots` its max_num_seqs."""

    def __init__(self, settings: dict[str, Any], device: Device) -> None:
        self._hasher = make_hasher()
        self._scheduler = make_scheduler(
            blocks=device.kv_blocks(BLOCK_TOKENS),
            block_tokens=BLOCK_TOKENS,
            sequences_max=settings.get("slots", 256),
            step_tokens=settings["step_tokens"],
            context_tokens=CONTEXT_TOKENS,
        )
        self._cached: dict[str, int] = {}  # tokens that each request found when it was admitted first

    def submit(self, request: Request, now_s: float) -> None:
        """Queue it. vLLM goes by the order of submission."""
        self._scheduler.add_request(
            VllmRequest(
                request_id=str(request.number),
                prompt_token_ids=request.prompt.tolist(),
                sampling_params=SamplingParams(max_tokens=request.output, ignore_eos=True),
                pooling_params=None,
                block_hasher=self._hasher,
            )
        )

    def plan(self, now_s: float) -> Step | None:
        """What it scheduled, row by row."""
        output = self._scheduler.schedule()
        if not output.num_scheduled_tokens:
            return None
        for admitted in output.scheduled_new_reqs:
            self._cached.setdefault(admitted.req_id, admitted.num_computed_tokens)
        decodes = context = 0
        prefills = []
        for request_id, length in output.num_scheduled_tokens.items():
            start = self._scheduler.requests[request_id].num_computed_tokens - length
            if length == 1:
                decodes, context = decodes + 1, context + start + 1
            else:
                prefills.append((start, length))
        return Step(decodes, context, prefills, output)

    def apply(self, step: Step, now_s: float, ran_s: float) -> Iterable[Emitted]:
        """Hand it the sampled tokens."""
        sampled = sampled_of(self._scheduler, step.payload)
        rows = [
            (self._scheduler.requests[request_id], bool(tokens))
            for request_id, tokens in zip(sampled.req_ids, sampled.sampled_token_ids, strict=True)
        ]
        self._scheduler.update_from_output(step.payload, sampled)
        for request, emits in rows:
            if emits:
                ended = request.is_finished()
                cached = self._cached.pop(request.request_id, 0) if ended else self._cached[request.request_id]
                yield Emitted(int(request.request_id), cached, ended)

    def facts(self) -> dict[str, float]:
        """Nothing of its own."""
        return {}


if __name__ == "__main__":
    serve(Vllm)

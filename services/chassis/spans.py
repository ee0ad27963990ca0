"""A worker's part of traces: what its Session sees of each traced sequence, as spans.

    queue      from the submission to the first plan that has it
    prefill    from there to the first token
    transfer   at the worker that takes the KV over, instead of both: until its first token says that it has all of it
    decode     from there to the end

Nothing is kept of sequences that are not traced.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from tokenrelay.proto import worker_pb2
from tokenrelay.services.chassis.tracing import Tracer, wall_offset_ns


@dataclass(slots=True)
class _Sequence:
    traceparent: str
    request_id: str
    choice: int
    prompt_tokens: int
    destination: bool
    began_s: float
    first_s: float = 0.0  # 0: no token yet
    queue_s: float = 0.0
    cached_tokens: int = 0
    tokens: int = 0
    finish: int = worker_pb2.FINISH_NONE


class Spans:
    """Of one worker. Event loop only; `open` is empty where nothing is traced."""

    def __init__(self, tracer: Tracer | None, worker: str) -> None:
        self._tracer = tracer
        self._worker = worker
        self.open: dict[int, _Sequence] = {}

    def begin(self, sequence_id: int, submit: worker_pb2.Submit) -> None:
        """It was accepted."""
        if self._tracer is not None and submit.traceparent:
            destination = submit.handover.role == worker_pb2.Handover.ROLE_DESTINATION
            self.open[sequence_id] = _Sequence(
                submit.traceparent, submit.request_id, submit.choice, submit.output_start, destination, time.monotonic()
            )

    def seen(self, sequence_id: int, output: worker_pb2.SequenceOutput) -> None:
        """Something of it leaves."""
        sequence = self.open.get(sequence_id)
        if sequence is None:
            return
        if output.token_ids:
            if not sequence.first_s:
                sequence.first_s = time.monotonic()
                sequence.queue_s, sequence.cached_tokens = output.waited_us / 1e6, output.cached_tokens
            sequence.tokens += len(output.token_ids) // 4
        sequence.finish = output.finish

    def ended(self, sequence_id: int) -> None:
        """It is over, however that came."""
        sequence = self.open.pop(sequence_id, None)
        if sequence is None or self._tracer is None:
            return
        now_s, offset_ns = time.monotonic(), wall_offset_ns()
        said: dict[str, str | int | float | bool] = {
            "tokenrelay.request_id": sequence.request_id,
            "tokenrelay.choice": sequence.choice,
            "tokenrelay.worker": self._worker,
        }
        finish = worker_pb2.FinishReason.Name(sequence.finish)
        end = {**said, "tokenrelay.finish": finish.removeprefix("FINISH_").lower()}
        traceparent, admitted_s = sequence.traceparent, sequence.began_s + sequence.queue_s
        if not sequence.first_s:
            name = "transfer" if sequence.destination else "queue"
            self._tracer.span(name, traceparent, sequence.began_s, now_s, end, offset_ns)
            return
        computed = {**said, "tokenrelay.prompt_tokens": sequence.prompt_tokens}
        computed["tokenrelay.cached_tokens"] = sequence.cached_tokens
        decode_s = sequence.first_s
        if sequence.destination:
            self._tracer.span("transfer", traceparent, sequence.began_s, decode_s, computed, offset_ns)
        else:
            self._tracer.span("queue", traceparent, sequence.began_s, admitted_s, said, offset_ns)
            self._tracer.span("prefill", traceparent, admitted_s, decode_s, computed, offset_ns)
        if sequence.finish != worker_pb2.FINISH_HANDOVER:
            decoded = {**end, "tokenrelay.output_tokens": sequence.tokens}
            self._tracer.span("decode", traceparent, decode_s, now_s, decoded, offset_ns)

"""A `Submit` from the wire as an engine's request. What the wire leaves out has its neutral value."""

from __future__ import annotations

import numpy as np

from tokenrelay.base.deadlines import Deadline
from tokenrelay.base.errors import InvalidRequest
from tokenrelay.proto import worker_pb2
from tokenrelay.runtime.requests import EngineRequest, SamplingParams


def engine_request(
    sequence_id: int, submit: worker_pb2.Submit, eos_token_ids: tuple[int, ...], deadline: Deadline
) -> EngineRequest:
    """Raises InvalidRequest for what cannot be read at all; the engine checks the values."""
    if len(submit.token_ids) % 4:
        raise InvalidRequest(f"token_ids holds {len(submit.token_ids)} bytes, not a multiple of 4")
    wire = submit.sampling
    end_token_ids = tuple(dict.fromkeys((*wire.stop_token_ids, *(() if wire.ignore_eos else eos_token_ids))))
    return EngineRequest(
        sequence_id=sequence_id,
        token_ids=np.frombuffer(submit.token_ids, dtype="<u4"),
        output_start=submit.output_start,
        tokens_max=submit.tokens_max,
        sampling=SamplingParams(
            temperature=wire.temperature,
            top_p=wire.top_p or 1.0,
            top_k=wire.top_k,
            min_p=wire.min_p,
            presence_penalty=wire.presence_penalty,
            frequency_penalty=wire.frequency_penalty,
            repetition_penalty=wire.repetition_penalty or 1.0,
            logit_bias=tuple((entry.token_id, entry.bias) for entry in wire.logit_bias),
            tokens_min=wire.tokens_min,
            end_token_ids=end_token_ids,
            logprobs=wire.logprobs,
            seed=submit.seed,
            choice=submit.choice,
            grammar=wire.grammar,
        ),
        stop_token_ids=end_token_ids,
        priority=submit.priority,
        salt=submit.salt,
        tenant=submit.tenant,
        tools=submit.tools,
        expected_tokens=submit.expected_tokens,
        tps_floor=submit.tps_floor,
        deadline=deadline,
        request_id=submit.request_id,
        parent=submit.parent if submit.parent_tokens else None,
        parent_tokens=submit.parent_tokens,
    )

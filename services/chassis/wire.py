"""Between an engine's words and the wire's. The chassis imports no engine: it says what it reads of one."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Protocol

from tokenrelay.base.errors import TokenRelayError
from tokenrelay.proto import worker_pb2
from tokenrelay.services.chassis.channel import encode_error


class Logprobs(Protocol):
    """Of one token (runtime/requests.py: TokenLogprobs)."""

    @property
    def logprob(self) -> float:
        """Of the sampled token."""

    @property
    def top_token_ids(self) -> Sequence[int]:
        """Most likely first."""

    @property
    def top_logprobs(self) -> Sequence[float]:
        """Theirs."""


class Output(Protocol):
    """What a step brought for one sequence (runtime/requests.py: EngineOutput)."""

    @property
    def sequence_id(self) -> int:
        """The host's id."""

    @property
    def token_ids(self) -> Sequence[int]:
        """New ones."""

    @property
    def finish(self) -> int:
        """The wire's FinishReason."""

    @property
    def cached_tokens(self) -> int:
        """With the first token."""

    @property
    def waited_us(self) -> int:
        """With the first token."""

    @property
    def logprobs(self) -> Sequence[Logprobs] | None:
        """One per token, or None."""

    @property
    def reject(self) -> int:
        """The wire's RejectReason."""

    @property
    def error(self) -> TokenRelayError | None:
        """Why it was refused or failed."""


def pack(token_ids: Sequence[int]) -> bytes:
    """Packed little-endian uint32."""
    if len(token_ids) == 1:
        return token_ids[0].to_bytes(4, "little")
    return struct.pack(f"<{len(token_ids)}I", *token_ids)


def sequence_output(output: Output) -> worker_pb2.SequenceOutput:
    """The wire's message, under the host's id."""
    message = worker_pb2.SequenceOutput(
        id=output.sequence_id,
        token_ids=pack(output.token_ids),
        finish=output.finish,  # type: ignore[arg-type]
        cached_tokens=output.cached_tokens,
        waited_us=output.waited_us,
    )
    if output.logprobs:
        message.logprobs.extend(
            worker_pb2.TokenLogprobs(
                logprob=entry.logprob, top_token_ids=entry.top_token_ids, top_logprobs=entry.top_logprobs
            )
            for entry in output.logprobs
        )
    if output.error is not None:
        message.error = encode_error(output.error)
        message.reject_reason = output.reject  # type: ignore[assignment]
    return message

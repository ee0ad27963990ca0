"""The prefill role: takes a prompt in, has its KV made, and owns that KV until somebody else adopted it.

Per sequence it walks the owner's side of docs/kv-ownership.md: reserve and offer at admission, seal when the first
token is there, release after the adoption, or reclaim when there is nothing to hand over. It emits the first token in
any case. Event loop only.
"""

from __future__ import annotations

from tokenrelay.base.deadlines import Deadline
from tokenrelay.base.errors import InvalidRequest, Overloaded, TokenRelayError, Unavailable
from tokenrelay.base.logging import get_logger
from tokenrelay.ledger.ledger import Actor, EmbeddedLedger, Handle, Rejection
from tokenrelay.proto import worker_pb2
from tokenrelay.runtime.engine import Engine
from tokenrelay.runtime.requests import EngineOutput
from tokenrelay.services.chassis.channel import encode_error
from tokenrelay.services.chassis.wire import sequence_output
from tokenrelay.services.prefill.config import PrefillConfig
from tokenrelay.services.prefill.convert import engine_request

log = get_logger("prefill")


class PrefillRole:
    """The owner's side of every handle of one engine."""

    def __init__(
        self,
        engine: Engine,
        ledger: EmbeddedLedger,
        actor: Actor,
        *,
        layers: int,
        eos_token_ids: tuple[int, ...],
        config: PrefillConfig | None = None,
    ) -> None:
        """`layers`: KV regions of a sequence, the extents of its handle."""
        self._engine = engine
        self._ledger = ledger
        self._actor = actor
        self._layers = layers
        self._eos_token_ids = eos_token_ids
        self._config = config or PrefillConfig()
        self._handles: dict[int, Handle] = {}  # of sequences whose KV is not handed over yet
        self._sequences: dict[Handle, int] = {}  # the same, by handle
        ledger.join(actor)

    @property
    def handles_open(self) -> int:
        """Handles this role must still bring to an end."""
        return len(self._handles)

    def admit(self, sequence_id: int, submit: worker_pb2.Submit) -> Handle | worker_pb2.SequenceOutput:
        """Begin: the offered handle, or the refusal. What fails later comes as an output of the engine."""
        deadline = Deadline.after(submit.deadline_left_ms / 1000) if submit.deadline_left_ms else Deadline.never()
        try:
            request = engine_request(sequence_id, submit, self._eos_token_ids, deadline)
        except InvalidRequest as error:
            return _refusal(worker_pb2.REJECT_INVALID, error)
        handle = self._ledger.reserve(self._actor, extents=self._layers, deadline_s=self._config.handle_deadline_s)
        if isinstance(handle, Rejection):
            return _refusal(worker_pb2.REJECT_QUEUE_FULL, Overloaded(f"no handle: {handle.reason}"))
        try:
            self._engine.submit(request)
        except TokenRelayError as error:
            self._must(self._ledger.reclaim(handle, self._actor), sequence_id)
            return _refusal(_REASONS.get(type(error), worker_pb2.REJECT_INVALID), error)
        self._must(self._ledger.offer(handle, self._actor), sequence_id)
        self._handles[sequence_id] = handle
        self._sequences[handle] = sequence_id
        return handle

    def sealed(self, sequence_id: int) -> Handle:
        """The first token is there: all KV of the prompt stands in every layer, and can be read."""
        handle = self._handles[sequence_id]
        self._must(self._ledger.seal(handle, self._actor, extents=self._layers), sequence_id)
        return handle

    def adopted(self, sequence_id: int) -> None:
        """The decode side goes on alone: give the pins back."""
        self._must(self._ledger.release(self._take(sequence_id), self._actor), sequence_id)

    def over(self, sequence_id: int) -> None:
        """It ended before anybody adopted it (an error, an abort, or the first token was the last)."""
        self._must(self._ledger.reclaim(self._take(sequence_id), self._actor), sequence_id)

    def owns(self, sequence_id: int) -> bool:
        """Whether its KV is not handed over yet."""
        return sequence_id in self._handles

    def emit(self, output: EngineOutput) -> worker_pb2.SequenceOutput:
        """The first token, or the end of a sequence that never had one, for the wire."""
        return sequence_output(output)

    def sequence_of(self, handle: Handle) -> int | None:
        """The sequence behind an open handle of this role."""
        return self._sequences.get(handle)

    def _take(self, sequence_id: int) -> Handle:
        handle = self._handles.pop(sequence_id)
        del self._sequences[handle]
        return handle

    def _must(self, rejection: Rejection | None, sequence_id: int) -> None:
        """A refusal of a transition of one's own handle is a programmer's error."""
        assert rejection is None, f"sequence {sequence_id}: {rejection}"


_REASONS: dict[type[TokenRelayError], worker_pb2.RejectReason] = {
    Overloaded: worker_pb2.REJECT_QUEUE_FULL,
    Unavailable: worker_pb2.REJECT_DRAINING,
}


def _refusal(reason: worker_pb2.RejectReason, error: TokenRelayError) -> worker_pb2.SequenceOutput:
    return worker_pb2.SequenceOutput(finish=worker_pb2.FINISH_REJECTED, reject_reason=reason, error=encode_error(error))

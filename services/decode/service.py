"""The decode role: claims a handle early, adopts it when all of its KV can be read, and goes on from there.

Per sequence it walks the claimant's side of docs/kv-ownership.md: claim, then adopt, or decline. Between claim and
adoption lies the transfer; where both roles share an engine it is the identity: the blocks are where they must be, and
`transfer` has nothing to move or to validate. Event loop only.
"""

from __future__ import annotations

from tokenrelay.ledger.ledger import Actor, EmbeddedLedger, Handle, Rejection
from tokenrelay.proto import worker_pb2
from tokenrelay.runtime.requests import EngineOutput
from tokenrelay.services.chassis.wire import sequence_output


class DecodeRole:
    """The claimant's side of every handle of one engine."""

    def __init__(self, ledger: EmbeddedLedger, actor: Actor, *, claim_deadline_s: float) -> None:
        self._ledger = ledger
        self._actor = actor
        self._claim_deadline_s = claim_deadline_s
        self._claims: dict[int, Handle] = {}  # claimed and neither adopted nor declined
        ledger.join(actor)

    @property
    def claims_open(self) -> int:
        """Handles this role must still adopt or decline."""
        return len(self._claims)

    def claim(self, sequence_id: int, handle: Handle) -> None:
        """Take the offer: there is room."""
        self._must(self._ledger.claim(handle, self._actor, deadline_s=self._claim_deadline_s), sequence_id)
        self._claims[sequence_id] = handle

    def adopt(self, sequence_id: int) -> None:
        """Everything is sealed, read and validated: the sequence's KV is this role's from now on."""
        handle = self._claims.pop(sequence_id)
        self._must(self._ledger.adopt(handle, self._actor, deadline_s=self._claim_deadline_s), sequence_id)

    def decline(self, sequence_id: int) -> None:
        """Nothing is read any more, and nothing will be adopted."""
        self._must(self._ledger.decline(self._claims.pop(sequence_id), self._actor), sequence_id)

    def emit(self, output: EngineOutput) -> worker_pb2.SequenceOutput:
        """Every token but the first, and the end of an adopted sequence, for the wire."""
        return sequence_output(output)

    def _must(self, rejection: Rejection | None, sequence_id: int) -> None:
        """A refusal of a transition of one's own claim is a programmer's error."""
        assert rejection is None, f"sequence {sequence_id}: {rejection}"

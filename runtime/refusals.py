"""The scheduler's refusals in this package's words: what goes onto the wire, and the error that says why.

reject, error = refused(RejectReason.QUEUE_FULL)
"""

from __future__ import annotations

from tokenrelay.base.errors import InvalidRequest, Overloaded, TokenRelayError, Unavailable
from tokenrelay.libscheduler import RejectReason
from tokenrelay.runtime.requests import Reject

_REFUSALS: dict[RejectReason, tuple[Reject, type[TokenRelayError], str]] = {
    RejectReason.QUEUE_FULL: (Reject.QUEUE_FULL, Overloaded, "the worker's queue is full"),
    RejectReason.PROMPT_TOO_LONG: (Reject.PROMPT_TOO_LONG, InvalidRequest, "the prompt does not fit in the context"),
    RejectReason.DUPLICATE_ID: (Reject.DUPLICATE_ID, InvalidRequest, "the sequence id is open"),
    RejectReason.INVALID: (Reject.INVALID, InvalidRequest, "the scheduler refused the request as invalid"),
    RejectReason.PARENT_UNKNOWN: (Reject.PARENT_UNKNOWN, Unavailable, "the parent's text is gone; submit all tokens"),
}


def refused(answer: RejectReason) -> tuple[Reject, TokenRelayError]:
    """The scheduler's typed refusal in this package's words."""
    reject, cls, message = _REFUSALS[answer]
    return reject, cls(message)

"""The one error tree. Each class says in one sentence what went wrong; foreign errors are translated at the boundary.

An expected refusal inside a process is a value with a reason; these are for what crosses a boundary or ends a start-up.
"""

from __future__ import annotations


class TokenRelayError(Exception):
    """Anything TokenRelay raises on purpose. `code` is stable and machine-readable; the message is for a person."""

    code = "internal_error"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidRequest(TokenRelayError):
    """What the client sent cannot be served as it is; `param` names the field, as the client spelled it."""

    code = "invalid_request"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        if code is not None:
            self.code = code


class NotFound(InvalidRequest):
    """The client named something that does not exist, such as a model."""

    code = "not_found"


class Overloaded(TokenRelayError):
    """A queue is at its bound; the same request may pass after `retry_after_s` seconds."""

    code = "overloaded"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RateLimited(Overloaded):
    """A client used what it may use; the same request may pass after `retry_after_s` seconds."""

    code = "rate_limit_exceeded"


class Unauthenticated(TokenRelayError):
    """A client showed no key, or one that nobody has."""

    code = "invalid_api_key"


class Forbidden(TokenRelayError):
    """A client's key is not for this."""

    code = "insufficient_permissions"


class Unavailable(TokenRelayError):
    """The part that would do the work is dead, not ready, or draining."""

    code = "unavailable"


class DeadlineExceeded(TokenRelayError):
    """The work was not done before its deadline."""

    code = "deadline_exceeded"


class ConfigError(TokenRelayError):
    """A setting is missing, unknown or has a wrong value; the message names the field and where it was set."""

    code = "config_error"


class CheckpointError(TokenRelayError):
    """A model folder cannot be loaded; the message names the file, the tensor and what was expected."""

    code = "checkpoint_error"

    def __init__(self, message: str, *, file: str | None = None, tensor: str | None = None) -> None:
        super().__init__(message)
        self.file = file
        self.tensor = tensor


class PlacementError(TokenRelayError):
    """Two modules state placements that do not fit; the message names both."""

    code = "placement_error"


class KernelUnavailable(TokenRelayError):
    """No registered kernel supports what was asked; the message prints required beside supported."""

    code = "kernel_unavailable"


class LedgerRejected(TokenRelayError):
    """A transition of a KV handle was refused: an unlisted pair, a stale generation, a stale term."""

    code = "ledger_rejected"


class HandshakeRefused(TokenRelayError):
    """Two processes do not fit together; the message names what differs and both values."""

    code = "handshake_refused"


class TransferFailed(TokenRelayError):
    """KV could not be moved: the peer is gone, fenced us, or answered nonsense; nothing of it may be adopted.

    `reason` is one of `peer_gone`, `fenced`, `corrupt`, `transport`, `closed`; a passed deadline is DeadlineExceeded.
    """

    code = "transfer_failed"

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class StaleGeneration(TokenRelayError):
    """A block was given to somebody else while it was read: what was read is thrown away."""

    code = "stale_generation"

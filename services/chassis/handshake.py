"""Do two processes fit together? A difference that matters is refused, naming both sides."""

from __future__ import annotations

from dataclasses import dataclass

from tokenrelay.base.errors import HandshakeRefused
from tokenrelay.proto import worker_pb2


@dataclass(frozen=True, slots=True)
class Expectation:
    """What the caller insists on; None: anything goes. `fleet` is for the message: who insists."""

    caller: str = "router"
    version: str | None = None
    model_name: str | None = None
    model_identity: bytes | None = None
    block_tokens: int | None = None
    vocab_size: int | None = None
    numerics: str | None = None

    _CHECKED = ("version", "model_name", "model_identity", "block_tokens", "vocab_size", "numerics")

    def check(self, reply: worker_pb2.HandshakeReply, target: str) -> None:
        """Raise HandshakeRefused that lists every difference with both values."""
        differences = []
        for name in self._CHECKED:
            expected, found = getattr(self, name), getattr(reply, name)
            if expected is not None and expected != found:
                differences.append(f"{name}: {self.caller} has {_show(expected)}, worker has {_show(found)}")
        if not reply.incarnation:
            differences.append("incarnation: the worker gave none")
        if differences:
            raise HandshakeRefused(f"{self.caller} and worker {target} do not fit: {'; '.join(differences)}")


def _show(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else repr(value)

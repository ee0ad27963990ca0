"""Which transports this machine has, and opening one.

kinds = available()                       # ("nixl", "shared", "stream"), best first
transport = open_transport(kinds[0], identity, memory, listen="unix:/run/tokenrelay/prefill-0.kv")
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from tokenrelay.base.errors import ConfigError
from tokenrelay.transfer.memory import Memory
from tokenrelay.transfer.metrics import Metrics
from tokenrelay.transfer.transport import Identity, Transport

if TYPE_CHECKING:
    from tokenrelay.transfer.security import Security

KINDS = ("nixl", "shared", "stream")  # in the order of preference


def available() -> tuple[str, ...]:
    """Kinds that can be opened here. `shared` needs a SharedPool and both ends on one machine."""
    has_nixl = importlib.util.find_spec("nixl_cu12") is not None
    return tuple(kind for kind in KINDS if kind != "nixl" or has_nixl)


def open_transport(
    kind: str,
    identity: Identity,
    memory: Memory,
    *,
    listen: str,
    token: str = "",
    security: Security | None = None,
    metrics: Metrics | None = None,
    advertise: str = "",
) -> Transport:
    """A transport that does not listen yet. Raises ConfigError for a kind that is not there.

    `listen`: `unix:PATH` or `HOST:PORT` (port 0: any), of the kind's own socket. `token` is shown to peers, `security`
    checks theirs and opens gRPC channels. `advertise`: the host that peers are told, where it listens on 0.0.0.0.
    """
    options: dict[str, Any] = {
        "listen": listen,
        "token": token,
        "security": security,
        "metrics": metrics,
        "advertise": advertise,
    }
    if kind not in KINDS:
        raise ConfigError(f"transport {kind!r}: expected one of {', '.join(KINDS)}")
    if kind == "stream":
        from tokenrelay.transfer.stream import StreamTransport

        return StreamTransport(identity, memory, **options)
    if kind == "shared":
        from tokenrelay.transfer.shared import SharedTransport

        return SharedTransport(identity, memory, **options)
    if kind not in available():
        raise ConfigError("transport 'nixl': the package nixl-cu12 is not installed (make setup installs it)")
    from tokenrelay.transfer.nixl import NixlTransport

    return NixlTransport(identity, memory, **options)

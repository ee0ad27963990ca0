"""What a transport asks of the fleet's security; services/chassis/security.py's Security is one, and so is Open."""

from __future__ import annotations

from typing import Any, Protocol

import grpc


class Security(Protocol):
    """Tokens and channels."""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Of every gRPC call."""

    def open_channel(self, target: str) -> grpc.aio.Channel:
        """To a peer."""

    def add_port(self, server: grpc.aio.Server, address: str) -> int:
        """Listen; the port in use."""

    def interceptors(self) -> list[Any]:
        """Of a gRPC server: they refuse calls without the token."""

    def allows(self, metadata: Any) -> bool:
        """Whether a call, or a control connection, with this metadata may pass."""


class Open:
    """No token and no TLS: one machine, or a network of one's own."""

    metadata: tuple[tuple[str, str], ...] = ()

    def open_channel(self, target: str) -> grpc.aio.Channel:
        """To a peer."""
        return grpc.aio.insecure_channel(
            target, options=[("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0), *COMMON_OPTIONS]
        )

    def add_port(self, server: grpc.aio.Server, address: str) -> int:
        """Listen."""
        return int(server.add_insecure_port(address))

    def interceptors(self) -> list[Any]:
        """None."""
        return []

    def allows(self, _: Any) -> bool:
        """Everybody."""
        return True


def token_of(token: str, security: Security | None) -> str:
    """What a control connection shows: the token that was given, or the one that gRPC calls carry."""
    if token or security is None:
        return token
    return dict(security.metadata).get("authorization", "").removeprefix("Bearer ")


MESSAGE_OPTIONS = [("grpc.max_send_message_length", 64 << 20), ("grpc.max_receive_message_length", 64 << 20)]
# An attachment is silent between pulls: keepalive finds a dead host after 15 s, and has to be allowed by the other end.
COMMON_OPTIONS = [
    *MESSAGE_OPTIONS,
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
SERVER_OPTIONS = [
    *COMMON_OPTIONS,
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.so_reuseport", 0),
]

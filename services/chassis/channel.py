"""gRPC plumbing: one set of options for both ends, and how errors of the tree travel as text.

server = grpc.aio.server(options=server_options())
channel = grpc.aio.insecure_channel("unix:/run/tokenrelay.sock", options=channel_options())
"""

from __future__ import annotations

from typing import Any

from tokenrelay.base import errors

# A prompt of 1 M tokens is 4 MiB of ids; a coalesced message of a slow reader stays far below.
MESSAGE_BYTES_MAX = 64 << 20
KEEPALIVE_TIME_MS = 10_000
KEEPALIVE_TIMEOUT_MS = 5_000
# Metadata keys by which the two ends of a Session name their lives.
ROUTER_INCARNATION_KEY = "tokenrelay-router-incarnation"
WORKER_INCARNATION_KEY = "tokenrelay-worker-incarnation"

Options = list[tuple[str, Any]]


def _common() -> Options:
    return [
        ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
        ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
        ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def server_options() -> Options:
    """Options of every gRPC server: message bounds, keepalive (a hung peer is known after 15 s)."""
    return [
        *_common(),
        ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_TIME_MS // 2),
        ("grpc.so_reuseport", 0),
    ]


def channel_options() -> Options:
    """Options of every gRPC channel; the pool is local, so a new channel never inherits a broken connection."""
    return [*_common(), ("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]


_CLASSES: dict[str, type[errors.TokenRelayError]] = {
    cls.code: cls
    for cls in (
        errors.TokenRelayError,
        errors.InvalidRequest,
        errors.Overloaded,
        errors.Unavailable,
        errors.DeadlineExceeded,
        errors.LedgerRejected,
    )
}


def encode_error(error: errors.TokenRelayError) -> str:
    """`code: message`, as `SequenceOutput.error` carries it."""
    return f"{error.code}: {error.message}"


def decode_error(text: str) -> errors.TokenRelayError:
    """The error that `encode_error` wrote; an unknown code gives the tree's root with the whole text."""
    code, separator, message = text.partition(": ")
    cls = _CLASSES.get(code) if separator else None
    return errors.TokenRelayError(text) if cls is None else cls(message)

"""Who may talk to a service: nothing (one machine), a shared token, or mutual TLS, for every gRPC service alike.

    security = Security(token="…")                                       # or certificate=…, key=…, authority=…
    server = grpc.aio.server(options=server_options(), interceptors=security.interceptors())
    security.add_port(server, "0.0.0.0:7000")
    channel = security.open_channel("kvstore:7000")
    stub.Session(metadata=security.metadata)

The token travels as `authorization: Bearer …` metadata (RFC 6750) and is compared in constant time. With TLS both sides
show a certificate of the fleet's own authority; the names in them are not looked at, as containers have none to keep,
so every service certificate carries the name `tokenrelay`.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from tokenrelay.base.config import setting
from tokenrelay.base.errors import ConfigError
from tokenrelay.services.chassis.channel import channel_options

TLS_NAME = "tokenrelay"  # of every service's certificate
TOKEN_BYTES_MIN = 16


@dataclass(frozen=True, kw_only=True)
class SecurityConfig:
    """The table `[security]`, the same for every service of a fleet (`TOKENRELAY_SECURITY_…`)."""

    token: str = setting("", "shared secret that services show each other, 16 bytes or more; empty: none is asked for")
    token_file: str = setting("", "file with the token, instead of it")
    certificate: str = setting("", "PEM file with this service's certificate; with key and authority: mutual TLS")
    key: str = setting("", "PEM file with its private key")
    authority: str = setting("", "PEM file with the fleet's own certificate authority")


class Security:
    """Both ends of a service-to-service connection."""

    def __init__(
        self, *, token: str = "", certificate: bytes | None = None, key: bytes = b"", authority: bytes = b""
    ) -> None:
        self._token = token
        self._certificate = certificate
        self._key = key
        self._authority = authority
        self.refused = 0  # calls without the token, ever

    @staticmethod
    def of(config: SecurityConfig) -> Security:
        """Read the files. Raises ConfigError that names the setting."""
        token = config.token
        if config.token_file:
            if token:
                raise ConfigError("security.token and security.token_file both give the token: set one of them")
            token = _read(config.token_file, "token_file").decode(errors="replace").strip()
        if token and len(token.encode()) < TOKEN_BYTES_MIN:
            raise ConfigError(f"security.token has {len(token.encode())} bytes, expected at least {TOKEN_BYTES_MIN}")
        if not token.isascii() or any(character.isspace() for character in token):
            raise ConfigError("security.token must be ASCII without spaces: it travels in a header")
        names = ("certificate", "key", "authority")
        given = [name for name in names if getattr(config, name)]
        if given and len(given) < len(names):
            missing = ", ".join(f"security.{name}" for name in names if name not in given)
            raise ConfigError(f"mutual TLS takes certificate, key and authority: {missing} missing")
        if not given:
            return Security(token=token)
        certificate, key, authority = (_read(getattr(config, name), name) for name in names)
        return Security(token=token, certificate=certificate, key=key, authority=authority)

    @property
    def encrypts(self) -> bool:
        """Whether what goes over a network is under TLS."""
        return self._certificate is not None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Of every call."""
        return (("authorization", f"Bearer {self._token}"),) if self._token else ()

    def open_channel(self, target: str) -> grpc.aio.Channel:
        """A channel to a service of the fleet. A Unix socket needs no TLS: its file's mode says who may open it."""
        if self._certificate is None or target.startswith("unix:"):
            return grpc.aio.insecure_channel(target, options=channel_options())
        credentials = grpc.ssl_channel_credentials(self._authority, self._key, self._certificate)
        options = [*channel_options(), ("grpc.ssl_target_name_override", TLS_NAME)]
        return grpc.aio.secure_channel(target, credentials, options=options)

    def add_port(self, server: grpc.aio.Server, address: str) -> int:
        """Listen; the port in use. Raises RuntimeError when it is taken."""
        if self._certificate is None or address.startswith("unix:"):
            return int(server.add_insecure_port(address))
        credentials = grpc.ssl_server_credentials(
            [(self._key, self._certificate)], root_certificates=self._authority, require_client_auth=True
        )
        return int(server.add_secure_port(address, credentials))

    def interceptors(self) -> list[grpc.aio.ServerInterceptor]:
        """Of a server: calls without the token end as UNAUTHENTICATED."""
        return [_TokenInterceptor(self)] if self._token else []

    def allows(self, metadata: Any) -> bool:
        """Whether a call with this metadata may pass: any may where no token is asked for."""
        if not self._token:
            return True
        given = next((value for key, value in metadata or () if key == "authorization"), "")
        given_bytes = given if isinstance(given, bytes) else given.encode()
        if hmac.compare_digest(given_bytes, f"Bearer {self._token}".encode()):
            return True
        self.refused += 1
        return False


class _TokenInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    def __init__(self, security: Security) -> None:
        self._security = security

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or self._security.allows(handler_call_details.invocation_metadata):
            return handler
        return _refusing(handler)


def _refusing(handler: Any) -> Any:
    """A handler of the same shape that refuses."""

    async def refuse(request: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the fleet's token is missing or wrong")

    shapes = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    shape = shapes[bool(handler.request_streaming), bool(handler.response_streaming)]
    return shape(
        refuse, request_deserializer=handler.request_deserializer, response_serializer=handler.response_serializer
    )


def _read(path: str, name: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"security.{name}: cannot read {path}: {error.strerror}") from error

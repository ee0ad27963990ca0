"""A gRPC server on a Unix socket or a TCP address.

server = WorkerServer(servicer, "unix:/run/tokenrelay/worker.sock")
await server.start()
await server.stop(grace_s=2)
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import grpc

from tokenrelay.base.errors import ConfigError
from tokenrelay.proto import worker_pb2_grpc
from tokenrelay.services.chassis.channel import server_options
from tokenrelay.services.chassis.security import Security

CALLS_MAX = 256  # open at once: one Session a router, and short ones
UNIX_PATH_BYTES_MAX = 107  # sockaddr_un.sun_path holds 108 with its final zero (unix(7))


class GrpcServer:
    """Serves one or more servicers at one address, to whom `security` allows."""

    def __init__(
        self,
        register: Callable[[grpc.aio.Server], None],
        address: str,
        *,
        security: Security | None = None,
        calls_max: int = CALLS_MAX,
    ) -> None:
        """`register` adds the servicers; a TCP port of 0 lets the system choose."""
        self._register = register
        self._security = security or Security()
        self._calls_max = calls_max
        self.address = address
        self.port = 0  # of a TCP address, once it listens
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Bind and accept. Raises ConfigError that names the address."""
        path = socket_path(self.address)
        if path is not None:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
        server = grpc.aio.server(
            options=server_options(),
            maximum_concurrent_rpcs=self._calls_max,
            interceptors=self._security.interceptors(),
        )
        self._register(server)
        previous = os.umask(0o077)  # the socket is this user's alone
        try:
            self.port = self._security.add_port(server, self.address)
            await server.start()
        except (RuntimeError, OSError) as error:
            raise ConfigError(f"cannot listen on {self.address}: {error}") from error
        finally:
            os.umask(previous)
        self._server = server

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, give the open ones `grace_s` seconds, and remove the socket."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(grace_s)
            path = socket_path(self.address)
            if path is not None:
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()


class WorkerServer(GrpcServer):
    """Serves a Worker servicer at one address."""

    def __init__(
        self, servicer: worker_pb2_grpc.WorkerServicer, address: str, *, security: Security | None = None
    ) -> None:
        super().__init__(
            lambda server: worker_pb2_grpc.add_WorkerServicer_to_server(servicer, server),  # type: ignore[no-untyped-call]
            address,
            security=security,
        )


def socket_path(address: str) -> Path | None:
    """The path of a `unix:` address, None for another kind. Raises ConfigError when it cannot be a socket's path."""
    if not address.startswith("unix:"):
        return None
    path = Path(address.removeprefix("unix:"))
    if len(os.fsencode(path)) > UNIX_PATH_BYTES_MAX:
        raise ConfigError(f"the socket path {path} is longer than the {UNIX_PATH_BYTES_MAX} bytes a Unix socket allows")
    if not path.parent.is_dir():
        raise ConfigError(f"the folder of the socket {path} does not exist")
    return path

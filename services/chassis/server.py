"""A gRPC server on a Unix socket or a TCP address.

server = WorkerServer(servicer, "unix:/run/tokenrelay/worker.sock")
await server.start()
await server.stop(grace_s=2)
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import grpc

from tokenrelay.base.errors import ConfigError
from tokenrelay.proto import worker_pb2_grpc
from tokenrelay.services.chassis.channel import server_options

CALLS_MAX = 256  # open at once: one Session a router, and short ones
UNIX_PATH_BYTES_MAX = 107  # sockaddr_un.sun_path holds 108 with its final zero (unix(7))


class WorkerServer:
    """Serves a Worker servicer at one address."""

    def __init__(self, servicer: worker_pb2_grpc.WorkerServicer, address: str) -> None:
        self._servicer = servicer
        self.address = address
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Bind and accept. Raises ConfigError that names the address."""
        path = socket_path(self.address)
        if path is not None:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
        server = grpc.aio.server(options=server_options(), maximum_concurrent_rpcs=CALLS_MAX)
        worker_pb2_grpc.add_WorkerServicer_to_server(self._servicer, server)  # type: ignore[no-untyped-call]
        previous = os.umask(0o077)  # the socket is this user's alone
        try:
            server.add_insecure_port(self.address)
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

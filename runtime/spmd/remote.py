"""A rank of another host: `python -m tokenrelay.runtime.spmd.remote`, for example under torchrun.

    torchrun --nnodes 2 --node-rank 1 --nproc-per-node 4 --master-addr 10.0.0.1 --master-port 29500 \\
        --no-python python -m tokenrelay.runtime.spmd.remote

RANK, MASTER_ADDR and MASTER_PORT are read from the environment. It ends with the connection to its leader.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
import traceback
from datetime import timedelta

import torch.distributed as dist

from tokenrelay.base.errors import TokenRelayError, Unavailable
from tokenrelay.runtime.executor.threads import use_threads
from tokenrelay.runtime.spmd.comm import LOAD_MAX_S
from tokenrelay.runtime.spmd.config import RankEnvironment
from tokenrelay.runtime.spmd.follower import follow
from tokenrelay.runtime.spmd.followers import HELLO_BYTES_MAX, JOIN_MAX_S

RETRY_S = 0.5  # the leader may start later


class _Later(Exception):
    """Not now: nobody listens yet, or a leader that has all its ranks, whose successor will lack this one."""


def join(settings: RankEnvironment, timeout_s: float = JOIN_MAX_S) -> tuple[socket.socket, dict[str, object]]:
    """The connection to the leader, and its welcome. Raises Unavailable."""
    end = time.monotonic() + timeout_s
    while True:
        try:
            return _join(settings, max(0.01, end - time.monotonic()))
        except (OSError, _Later) as error:
            if time.monotonic() > end:
                said = getattr(error, "strerror", None) or error
                raise Unavailable(f"nobody leads at {settings.host}:{settings.port}: {said}") from error
            time.sleep(RETRY_S)


def _join(settings: RankEnvironment, timeout_s: float) -> tuple[socket.socket, dict[str, object]]:
    """One attempt. Raises Unavailable when it was refused, OSError and _Later when another may do."""
    with contextlib.ExitStack() as failed:
        connection = failed.enter_context(socket.create_connection((settings.host, settings.port), timeout=timeout_s))
        connection.sendall(json.dumps({"rank": settings.rank, "key": settings.key}).encode() + b"\n")
        line = b""
        while not line.endswith(b"\n") and len(line) < HELLO_BYTES_MAX:
            part = connection.recv(1)  # byte by byte: what follows are frames
            if not part:
                raise _Later("it ended the connection")
            line += part
        welcome: dict[str, object] = json.loads(line)
        if welcome.get("later"):
            raise _Later(str(welcome["error"]))
        if "error" in welcome:
            raise Unavailable(f"{settings.host}:{settings.port}: {welcome['error']}")
        connection.settimeout(None)
        failed.pop_all()
        return connection, welcome


def main() -> int:
    """Join, follow, end with the leader."""
    try:
        settings = RankEnvironment.read()
        connection, welcome = join(settings)
    except TokenRelayError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1
    use_threads(int(str(welcome["threads"])))
    address = connection.getsockname()[0]
    wait = timedelta(seconds=LOAD_MAX_S)
    store = dist.TCPStore(settings.host, int(str(welcome["port"])), None, False, timeout=wait)  # type: ignore[attr-defined]
    fd = connection.fileno()
    code = 0
    try:
        follow(settings.rank, store, float(str(welcome["step_max_s"])), fd, fd, host=address)
    except Exception:
        traceback.print_exc()
        code = 1
    os._exit(code)  # gloo's threads may wait for a peer that has ended first


if __name__ == "__main__":
    sys.exit(main())

"""Ask the worker at ADDRESS who it is, with the right token, a wrong one and none: its role, or the refusal's code."""

import asyncio
import sys
from pathlib import Path

import grpc

from tokenrelay.proto import worker_pb2, worker_pb2_grpc
from tokenrelay.services.chassis.security import Security

TOKEN = Path("/run/tokenrelay/token").read_text().strip()


async def ask(target: str, token: str) -> str:
    security = Security(token=token)
    async with security.open_channel(target) as channel:
        try:
            request = worker_pb2_grpc.WorkerStub(channel).Handshake(
                worker_pb2.HandshakeRequest(), metadata=security.metadata, timeout=10
            )
            return str((await request).role)
        except grpc.aio.AioRpcError as error:
            return str(error.code().name)


for token in (TOKEN, TOKEN[:-1] + ("1" if TOKEN[-1] == "0" else "0"), ""):
    print(asyncio.run(ask(sys.argv[1], token)))

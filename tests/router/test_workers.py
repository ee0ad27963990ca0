"""Several workers behind one router."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import aiohttp
from mock_worker import MockWorker, Script
from router_stack import until

from tokenrelay.proto import worker_pb2
from tokenrelay.services.router.config import RouterConfig
from tokenrelay.services.router.service import RouterService

BODY = {"messages": [{"role": "user", "content": "Hi"}]}


async def test_sequences_go_to_the_worker_with_the_fewest(tmp_path: Path, model_folder: Path) -> None:
    workers = [MockWorker(f"unix:{tmp_path}/{name}", model_folder) for name in "ab"]
    for worker in workers:
        await worker.start()
        worker.host.answer = lambda submit: Script([], finish=worker_pb2.FINISH_NONE)
    config = dataclasses.replace(RouterConfig(), port=0, worker=tuple(worker.address for worker in workers))
    service = RouterService(config)
    port = await service.start()
    await until(lambda: len(service.pool.usable) == 2)
    async with aiohttp.ClientSession() as http:
        requests = []
        for count in range(1, 5):
            requests.append(asyncio.create_task(_post(http, port)))
            await until(lambda count=count: sum(worker.running for worker in workers) == count)
        assert [worker.running for worker in workers] == [2, 2]
        # One dies: its requests go on at the other, and new ones go there.
        workers[1].say("still here")
        await workers[0].stop()
        await until(lambda: len(service.pool.usable) == 1)
        await until(lambda: sum(request.done() for request in requests) == 2)
        assert {await request for request in requests if request.done()} == {200}
        assert await _post(http, port) == 200
        for request in requests:
            request.cancel()
    await service.stop()
    await workers[1].stop()


async def test_a_worker_with_another_model_is_not_used(tmp_path: Path, model_folder: Path) -> None:
    first = MockWorker(f"unix:{tmp_path}/a", model_folder)
    other = MockWorker(f"unix:{tmp_path}/b", model_folder, model_name="another")
    other.host.reply.model_identity = b"another identity"
    config = dataclasses.replace(RouterConfig(), port=0, worker=(first.address, other.address))
    service = RouterService(config)
    await first.start()
    port = await service.start()
    await until(lambda: len(service.pool.usable) == 1)
    await other.start()
    await until(lambda: "runs 'another'" in service.pool.why_not())
    assert [client.target for client in service.pool.usable] == [first.address]
    # When the first has gone, the other takes over.
    await first.stop()
    await until(lambda: [client.target for client in service.pool.usable] == [other.address])
    assert service.pool.require_model().names == ("another",)
    async with aiohttp.ClientSession() as http:
        assert await _post(http, port) == 200
    await service.stop()
    await other.stop()


async def _post(http: aiohttp.ClientSession, port: int) -> int:
    async with http.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=BODY) as response:
        return response.status

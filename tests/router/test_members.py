"""Workers found through a kvstore: who joins is used, who leaves is not, and a lost kvstore stops nothing."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from mock_worker import MockWorker
from router_stack import Stack, until

from tokenrelay.ledger.api import Joined, Member
from tokenrelay.ledger.client import KvstoreClient
from tokenrelay.services.chassis.security import Security
from tokenrelay.services.kvstore.config import KvstoreConfig
from tokenrelay.services.kvstore.service import KvstoreService
from tokenrelay.services.router.config import RouterConfig
from tokenrelay.services.router.service import RouterService


class Mesh:
    """A kvstore, a router that knows nothing else, and members that tell of mock workers."""

    def __init__(self, folder: Path, model: Path) -> None:
        self._folder, self._model = folder, model
        self.kvstore: KvstoreService | None = None
        self.workers: dict[str, MockWorker] = {}
        self.clients: list[KvstoreClient] = []
        self.members: dict[str, Member] = {}
        self._kvstore_config = KvstoreConfig(address=f"unix:{folder}/kv", admin_port=0)

    async def start(self) -> None:
        await self.start_kvstore()
        config = dataclasses.replace(RouterConfig(), port=0, kvstore=(self._kvstore_config.address,))
        self.router = RouterService(config)
        port = await self.router.start()
        self.stack = Stack(None, self.router, f"http://127.0.0.1:{port}", aiohttp.ClientSession())  # type: ignore[arg-type]

    async def start_kvstore(self) -> None:
        self.kvstore = KvstoreService(self._kvstore_config, Security(), "kv")
        await self.kvstore.start()

    async def stop_kvstore(self) -> None:
        assert self.kvstore is not None
        await self.kvstore.stop()
        self.kvstore = None

    async def join(self, name: str, life: str = "1") -> KvstoreClient:
        """A worker starts, and says so."""
        if name not in self.workers:
            self.workers[name] = MockWorker(f"unix:{self._folder}/{name}", self._model)
            await self.workers[name].start()
        client = KvstoreClient([self._kvstore_config.address])
        client.start()
        self.clients.append(client)
        self.members[name] = Member(
            name=name, incarnation=life, role="colocated", address=self.workers[name].address, model_identity=b"m" * 16
        )
        assert isinstance(await client.join(self.members[name], lease_s=30), Joined)
        return client

    @property
    def used(self) -> set[str]:
        return {client.target.rpartition("/")[2] for client in self.router.pool.usable}

    async def close(self) -> None:
        await self.stack.http.close()
        await self.router.stop()
        for client in self.clients:
            await client.close()
        for worker in self.workers.values():
            await worker.stop()
        if self.kvstore is not None:
            await self.kvstore.stop()


@pytest.fixture
async def mesh(tmp_path: Path, model_folder: Path) -> AsyncIterator[Mesh]:
    mesh = Mesh(tmp_path, model_folder)
    await mesh.start()
    yield mesh
    await mesh.close()


async def test_workers_come_and_go(mesh: Mesh) -> None:
    status, reply = await mesh.stack.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]})
    assert status == 503
    assert "none is known" in reply["error"]["message"]
    first = await mesh.join("a")
    await until(lambda: mesh.used == {"a"})
    await mesh.stack.chat()
    await mesh.join("b")
    await until(lambda: mesh.used == {"a", "b"})
    # One leaves in good order: what it still serves goes on until its connection ends.
    await first.leave(mesh.members["a"].actor)
    await asyncio.sleep(0.05)
    await mesh.workers["a"].stop()
    await until(lambda: [client.target for client in mesh.router.pool.clients] == [mesh.workers["b"].address])
    await mesh.stack.chat()


async def test_what_ran_on_the_last_but_one_worker_goes_on(mesh: Mesh) -> None:
    for name in "ab":
        await mesh.join(name)
    await until(lambda: mesh.used == {"a", "b"})
    for worker in mesh.workers.values():
        worker.host.step_s = 0.01
        worker.say("The quick brown fox jumps over the lazy dog")
    streams = [asyncio.create_task(mesh.stack.chat_stream()) for _ in range(4)]
    await until(lambda: all(worker.running for worker in mesh.workers.values()))
    await mesh.clients[0].leave(mesh.members["a"].actor)
    await mesh.workers["a"].stop()
    for events in await asyncio.wait_for(asyncio.gather(*streams), 10):
        assert events[-1] == "[DONE]"


async def test_a_lost_kvstore_stops_nothing(mesh: Mesh) -> None:
    await mesh.join("a")
    await until(lambda: mesh.used == {"a"})
    await mesh.stop_kvstore()
    await asyncio.sleep(0.1)
    await mesh.stack.chat()
    await mesh.start_kvstore()
    await mesh.join("b")
    await until(lambda: "b" in mesh.used, timeout_s=10)
    await mesh.stack.chat()

"""A kvstore, routers that know nothing else, and members that tell of mock workers, in one process."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import aiohttp
from mock_worker import BLOCK_TOKENS, MockWorker
from router_stack import Stack

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
        self.hash_key = b""
        self._stacks: list[Stack] = []
        self._kvstore_config = KvstoreConfig(address=f"unix:{folder}/kv", admin_port=0)

    async def start(self) -> None:
        await self.start_kvstore()
        await self.start_router()

    async def start_router(self) -> None:
        """The one that `router` and `stack` are; another one stays as it is."""
        config = dataclasses.replace(RouterConfig(), port=0, kvstore=(self._kvstore_config.address,))
        self.router = RouterService(config)
        port = await self.router.start()
        self.stack = Stack(None, self.router, f"http://127.0.0.1:{port}", aiohttp.ClientSession())  # type: ignore[arg-type]
        self._stacks.append(self.stack)

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
            name=name,
            incarnation=life,
            role="colocated",
            address=self.workers[name].address,
            model_identity=b"m" * 16,
            block_tokens=BLOCK_TOKENS,
        )
        joined = await client.join(self.members[name], lease_s=30)
        assert isinstance(joined, Joined)
        self.hash_key = joined.hash_key
        return client

    @property
    def used(self) -> set[str]:
        return {client.target.rpartition("/")[2] for client in self.router.pool.usable}

    async def close(self) -> None:
        for stack in self._stacks:
            await stack.http.close()
            await stack.service.stop()
        for client in self.clients:
            await client.close()
        for worker in self.workers.values():
            await worker.stop()
        if self.kvstore is not None:
            await self.kvstore.stop()

"""Ledgers to test: embedded, behind a kvstore, behind a kvstore with etcd; and members to use them."""

from __future__ import annotations

import asyncio
import secrets
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from tokenrelay.base.ids import incarnation
from tokenrelay.ledger.api import Handle, Ledger, Member, Notice, Rejection
from tokenrelay.ledger.client import KvstoreClient
from tokenrelay.ledger.connection import ConnectionOptions
from tokenrelay.ledger.local import LocalLedger
from tokenrelay.services.chassis.security import Security
from tokenrelay.services.kvstore.config import KvstoreConfig
from tokenrelay.services.kvstore.service import KvstoreService

FAST = ConnectionOptions(connect_timeout_s=1, call_timeout_s=2, backoff_min_s=0.01, backoff_max_s=0.1)


def member(name: str, life: str = "1", role: str = "decode", **fields: Any) -> Member:
    """One that pairs with the others."""
    given = {"model_identity": b"m" * 16, "dtype": "bfloat16", "block_tokens": 64, "layout": "mla 512+64", **fields}
    return Member(name=name, incarnation=life, role=role, **given)


class Fleet:
    """One ledger, as many clients of it as wanted."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="tr-")
        self._clients: list[KvstoreClient] = []
        self.services: list[KvstoreService] = []
        self.local: LocalLedger | None = None
        self._backend: dict[str, Any] = {}

    def use_etcd(self, endpoint: str, lease_s: float = 1.0, timeout_s: float = 0.3) -> None:
        """For every kvstore started from now on: one fleet's keys."""
        prefix = f"/test-{secrets.token_hex(4)}/"
        self._backend = {"backend": "etcd", "etcd": (endpoint,), "etcd_prefix": prefix}
        self._backend |= {"lease_s": lease_s, "etcd_timeout_s": timeout_s}

    async def start_service(self, name: str = "kv", security: Security | None = None, **fields: Any) -> KvstoreService:
        """A kvstore in this process, on a socket of its own."""
        given: dict[str, Any] = {"address": f"unix:{self._folder.name}/{name}.sock", "admin_port": 0, "answer_s": 0.2}
        given |= {**self._backend, **fields}
        config = KvstoreConfig(**given)
        service = KvstoreService(config, security or Security(), incarnation())
        await service.start()
        self.services.append(service)
        return service

    async def client(self, *targets: str, **options: Any) -> Ledger:
        """A ledger as a process of its own would have it."""
        if self.local is not None:
            return self.local
        return await self.kvstore_client(*targets, **options)

    async def kvstore_client(self, *targets: str, **options: Any) -> KvstoreClient:
        """A client of the kvstores, or of `targets`; connected."""
        addresses = targets or [service.address for service in self.services]
        client = KvstoreClient(list(addresses), **{"options": FAST, **options})
        client.start()
        self._clients.append(client)
        assert await client.wait_ready(10), client.connection.last_error
        return client

    async def close(self) -> None:
        """End everything."""
        for client in self._clients:
            await client.close()
        for service in self.services:
            await service.stop()
        if self.local is not None:
            self.local.host.close()
        self._folder.cleanup()

    @property
    def folder(self) -> Path:
        """For files of the test."""
        return Path(self._folder.name)


class Watcher:
    """Collects a member's notices."""

    def __init__(self, ledger: Ledger, who: Member) -> None:
        self.notices: list[Notice] = []
        self.ended = asyncio.Event()
        self._task = asyncio.create_task(self._run(ledger.watch(who.actor)))
        self._arrived = asyncio.Event()

    async def _run(self, notices: AsyncIterator[Notice]) -> None:
        async for notice in notices:
            self.notices.append(notice)
            self._arrived.set()
        self.ended.set()
        self._arrived.set()

    async def until(self, wanted: Callable[[Notice], bool], timeout_s: float = 5.0) -> Notice:
        """The first notice of this kind, however long ago it came."""
        async with asyncio.timeout(timeout_s):
            while True:
                for notice in self.notices:
                    if wanted(notice):
                        return notice
                self._arrived.clear()
                await self._arrived.wait()

    def close(self) -> None:
        """Watch no more."""
        self._task.cancel()


def named(answer: Handle | Rejection) -> Handle:
    """The handle of a reservation that must have succeeded."""
    assert isinstance(answer, Handle), answer
    return answer

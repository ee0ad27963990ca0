"""The kvstore process: start, serve, drain, stop.

service = KvstoreService(config, Security(), incarnation)
await service.start()
...
await service.drain(); await service.stop()
"""

from __future__ import annotations

import os
from pathlib import Path

import grpc

from tokenrelay.base.logging import get_logger
from tokenrelay.base.status import StatusPipe
from tokenrelay.ledger.directory import PrefixDirectory
from tokenrelay.ledger.directory_host import DirectoryHost
from tokenrelay.ledger.host import LedgerHost
from tokenrelay.ledger.tier import BlockTier
from tokenrelay.proto import kvstore_pb2_grpc
from tokenrelay.services.chassis.admin import AdminServer
from tokenrelay.services.chassis.lifecycle import Lifecycle
from tokenrelay.services.chassis.security import Security
from tokenrelay.services.chassis.server import GrpcServer
from tokenrelay.services.kvstore.backend import EtcdBackend
from tokenrelay.services.kvstore.config import KvstoreConfig
from tokenrelay.services.kvstore.folders import own_folder
from tokenrelay.services.kvstore.metrics import render
from tokenrelay.services.kvstore.servicer import KvstoreServicer
from tokenrelay.services.kvstore.store import Store

log = get_logger("kvstore")

CALLS_MAX = 4096  # open at once: a session a member process, a stream a router, blocks on their way
STOP_GRACE_S = 0.5


class KvstoreService:
    """One kvstore, from start to stop."""

    def __init__(self, config: KvstoreConfig, security: Security, incarnation: str) -> None:
        self._config = config
        self._security = security
        self._draining = False
        host = LedgerHost(
            handles_max=config.handles_max, lease_max_s=config.member_lease_max_s, answer_s=config.answer_s, term=1
        )
        directory = DirectoryHost(PrefixDirectory(entries_max=config.directory_entries_max))
        self._folder_lock, folder = own_folder(Path(config.tier_dir)) if config.tier_dir else (-1, None)
        tier = BlockTier(
            memory_bytes=config.tier_memory_bytes,
            disk=folder,
            disk_bytes=config.tier_disk_bytes,
        )
        self.tier = tier
        self.store = Store(host, directory, incarnation, tier, backend=config.backend)
        self.servicer = KvstoreServicer(self.store)
        self._server = GrpcServer(self._register, config.address, security=security, calls_max=CALLS_MAX)
        self._admin = AdminServer(config.admin_host, config.admin_port, ready=self.ready, metrics=self.metrics)
        self.admin_port = 0
        self.backend: EtcdBackend | None = None
        if config.backend == "etcd":
            self.backend = EtcdBackend(config, self.store, lambda: self.address, self.servicer.end_sessions)

    def _register(self, server: grpc.aio.Server) -> None:
        kvstore_pb2_grpc.add_KvstoreServicer_to_server(self.servicer, server)  # type: ignore[no-untyped-call]

    @property
    def address(self) -> str:
        """Where it is reached."""
        if self._config.advertise:
            return self._config.advertise
        if self._config.address.startswith("unix:"):
            return self._config.address
        return f"{self._config.address.rpartition(':')[0]}:{self._server.port}"

    async def start(self) -> None:
        """Bind and serve. Raises ConfigError that names the address or the folder."""
        await self.tier.start()
        await self._server.start()
        self.admin_port = await self._admin.start()
        if self.backend is not None:
            self.backend.start()

    def ready(self) -> tuple[bool, str]:
        """Whether this process does what it is for: decide, or stand by for who does."""
        if self._draining:
            return False, "draining"
        status = self.servicer.status()
        return status.role in ("active", "standby"), status.reason or status.role

    def metrics(self) -> str:
        """The Prometheus page."""
        return render(self.store, self.servicer, self.backend, self._security.refused)

    async def drain(self) -> None:
        """Send the clients elsewhere, with everything they were told written down."""
        self._draining = True
        self.servicer.drain("this kvstore drains")
        if self.backend is not None:
            await self.backend.drain(self._config.drain_s)
        await self.tier.flushed(self._config.drain_s)

    async def stop(self) -> None:
        """End everything now."""
        if self.backend is not None:
            await self.backend.stop()
        self.store.host.close()
        await self._server.stop(STOP_GRACE_S)
        await self._admin.stop()
        await self.tier.stop()
        if self._folder_lock >= 0:
            os.close(self._folder_lock)
            self._folder_lock = -1


async def run(config: KvstoreConfig, security: Security, incarnation: str, status: StatusPipe) -> None:
    """The life of the process: ready when the port accepts, ended by signals."""
    lifecycle = Lifecycle()
    lifecycle.install_signals()
    service = KvstoreService(config, security, incarnation)
    await service.start()
    lifecycle.ready()
    log.info("listening", address=service.address, admin_port=service.admin_port, backend=config.backend)
    status.ready(address=service.address, admin_port=service.admin_port, backend=config.backend)
    try:
        await lifecycle.wait_drain()
        await lifecycle.unless_stopped(service.drain())
    finally:
        await service.stop()

"""Fixtures of the kvstore's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from etcd_server import EtcdServer
from kv_fleet import Fleet

from tokenrelay.ledger.host import LedgerHost
from tokenrelay.ledger.local import LocalLedger


@pytest.fixture(scope="session")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """One for tests that do it no harm; each uses a prefix of its own."""
    server = EtcdServer(tmp_path_factory.mktemp("etcd"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def own_etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    """One to be stopped and paused."""
    server = EtcdServer(tmp_path)
    server.start()
    yield server
    server.stop()


@pytest_asyncio.fixture(params=["embedded", "kvstore", "etcd"])
async def fleet(request: pytest.FixtureRequest) -> AsyncIterator[Fleet]:
    """A ledger on each backend."""
    fleet = Fleet()
    if request.param == "embedded":
        fleet.local = LocalLedger(LedgerHost(answer_s=0.2))
    elif request.param == "kvstore":
        await fleet.start_service()
    else:
        fleet.use_etcd(request.getfixturevalue("etcd").endpoint)
        service = await fleet.start_service()
        assert service.store.backend == "etcd" and service.backend is not None
    yield fleet
    await fleet.close()


@pytest_asyncio.fixture
async def empty_fleet() -> AsyncIterator[Fleet]:
    """No kvstore yet."""
    fleet = Fleet()
    yield fleet
    await fleet.close()

"""Fixtures of the kvstore's tests."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

sys.path.insert(0, str(Path(__file__).parent))

from kv_fleet import Fleet

from tokenrelay.ledger.host import LedgerHost
from tokenrelay.ledger.local import LocalLedger


@pytest_asyncio.fixture(params=["embedded", "kvstore"])
async def fleet(request: pytest.FixtureRequest) -> AsyncIterator[Fleet]:
    """A ledger on each backend."""
    fleet = Fleet()
    if request.param == "embedded":
        fleet.local = LocalLedger(LedgerHost(answer_s=0.2))
    else:
        await fleet.start_service()
    yield fleet
    await fleet.close()


@pytest_asyncio.fixture
async def empty_fleet() -> AsyncIterator[Fleet]:
    """No kvstore yet."""
    fleet = Fleet()
    yield fleet
    await fleet.close()

"""Both ends of a transfer: this process reads, another one owns (or the other way round)."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator

import pytest
from pools import Pool, layout
from transfer_stage import Stage

from tokenrelay.transfer.select import available


def pytest_report_header() -> str:
    """Which transports are tested is never a secret."""
    return f"transports: {', '.join(available())}"


@pytest.fixture(params=available())
def kind(request: pytest.FixtureRequest) -> str:
    """Each transport in turn."""
    return str(request.param)


@pytest.fixture
def folder() -> Iterator[str]:
    """For sockets: a short path."""
    with tempfile.TemporaryDirectory(prefix="tr-") as name:
        yield name


@pytest.fixture
async def stage(kind: str, folder: str) -> AsyncIterator[Stage]:
    """Of the transport in turn."""
    stage = Stage(kind, folder)
    yield stage
    await stage.close()


@pytest.fixture
def pool() -> Pool:
    """This process's."""
    return Pool(layout(), 48)

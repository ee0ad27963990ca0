"""A real router on a real port in front of a mock worker on a real socket, all on the test's event loop."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from fuzzed import Fuzzed
from mock_worker import MockWorker, write_model_folder
from router_stack import Stack, StartStack, until

from tokenrelay.services.router.config import RouterConfig
from tokenrelay.services.router.service import RouterService


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("mock-model"))


@pytest.fixture
async def start_stack(model_folder: Path) -> AsyncIterator[StartStack]:
    """Start stacks with settings of one's own; they end with the test."""
    stacks: list[Stack] = []
    with tempfile.TemporaryDirectory(prefix="tr-") as sockets:

        async def start(*, folder: Path = model_folder, worker_runs: bool = True, **settings: Any) -> Stack:
            address = f"unix:{sockets}/{len(stacks)}"
            worker = MockWorker(address, folder)
            its = {"worker": (address,), **settings}
            config = dataclasses.replace(RouterConfig(), port=0, **its)
            service = RouterService(config)
            if worker_runs:
                await worker.start()
            port = await service.start()
            stack = Stack(worker, service, f"http://127.0.0.1:{port}", aiohttp.ClientSession())
            stacks.append(stack)
            if worker_runs:
                await until(lambda: bool(service.pool.usable))
            return stack

        yield start
        for stack in stacks:
            await stack.http.close()
            await stack.service.stop()
            await stack.worker.stop()


@pytest.fixture
async def stack(start_stack: StartStack) -> Stack:
    return await start_stack()


@pytest.fixture(scope="module")
def fuzzed(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzed]:
    stack = Fuzzed(model_folder, tmp_path_factory.mktemp("fuzz"))
    yield stack
    stack.close()

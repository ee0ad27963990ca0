"""Servers for the end-to-end tests: real processes, started with the command a user types.

The bundled model serves what needs a model that follows its template; small random-weight checkpoints serve what needs
time (ignore_eos) or length. A server is shared by the tests of a module unless a test is about its end.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_checkpoint
from serving import Server

from tokenrelay.cli.own import OwnServer


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSeek-V3 in small, random weights."""
    return make_checkpoint(tmp_path_factory.mktemp("models") / "random-mla", "deepseek_v3")


@pytest.fixture(scope="session")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a long context and one layer less wide."""
    folder = tmp_path_factory.mktemp("models") / "random-long"
    return make_checkpoint(folder, "deepseek_v3", max_position_embeddings=40960)


LOGS: list[Path] = []  # of the module's servers
LOG_SHOWN = 12_000  # characters, the last ones


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What the servers said, beside the failure."""
    report = yield
    if report.failed:
        for log in LOGS:
            report.sections.append((f"{log.parent.name}/{log.name}", log.read_text(errors="replace")[-LOG_SHOWN:]))
    return report


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Starts servers that live as long as the module's tests; logs go to a file that is shown when one fails."""
    with ExitStack() as stack:

        def begin(*arguments: Any, command: str = "serve") -> Server:
            LOGS.append(tmp_path_factory.mktemp("logs") / "server.log")
            log = stack.enter_context(LOGS[-1].open("w"))
            own = OwnServer([str(a) for a in arguments], command=command, stderr=log, quiet=True)
            return Server(stack.enter_context(own))

        yield begin
    LOGS.clear()


@pytest.fixture(scope="module")
def bundled(start: Callable[..., Server]) -> Server:
    """The bundled model, in float32 so that greedy text is the same in every batch."""
    return start("--dtype", "float32")


@pytest.fixture
def kill() -> Callable[[int], None]:
    return lambda pid: os.kill(pid, signal.SIGKILL)

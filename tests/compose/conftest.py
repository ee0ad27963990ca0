"""The compose stack on a real Docker engine: minutes long and not everywhere, so only where it is asked for.

    make test-compose          # TOKENRELAY_TEST_COMPOSE=1 pytest tests/compose

The engine is the one that `docker` reaches. deploy/.env.example's variables are taken from the environment
(TOKENRELAY_WHEELS: a folder of wheels to install from; TOKENRELAY_BASE: the base image).
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from compose_stack import Stack

collect_ignore = [] if os.environ.get("TOKENRELAY_TEST_COMPOSE") else ["test_stack.py"]


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """Built, started, ready; removed at the end. Its logs are shown where a test failed."""
    stack = Stack()
    try:
        stack.compose("build", timeout_s=3600)
        stack.compose("up", "--detach", "--wait", "--wait-timeout", "300", timeout_s=400)
        yield stack
    finally:
        print(stack.compose("logs", "--no-color", "--tail", "60", check=False))
        stack.compose("down", "--volumes", "--remove-orphans", "--timeout", "5", timeout_s=200)

"""The interpreter prepares Triton's language once a launch."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(20261121)


@pytest.fixture(scope="session", autouse=True)
def _nested_calls_prepare_nothing() -> None:
    """Each call of one jitted function by another walks all of Triton's language and replaces what the launch around it
    has replaced: most of the interpreter's time. What such a call replaces is never put back, so once is enough."""
    prepared: set[frozenset[str]] = set()

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        modules = {value.__name__ for value in self.fn.__globals__.values() if inspect.ismodule(value)}
        language = frozenset(modules & {tl.__name__, tl.core.__name__})
        if language not in prepared:
            interpreter._patch_lang(self.fn)
            prepared.add(language)
        return self.rewrite()(*arguments, **options)

    interpreter.InterpretedFunction.__call__ = call

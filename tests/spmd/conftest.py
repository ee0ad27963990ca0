"""One pool of four ranks for all tests of this folder: three followers, each importing torch once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint

from tokenrelay.runtime.spmd.ranks import Ranks

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    with Ranks(4, step_max_s=60) as pool:
        yield pool


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[str, Path] = {}

    def make(name: str, family: str, **overrides: Any) -> Path:
        if name not in made:
            made[name] = make_checkpoint(tmp_path_factory.mktemp(name) / name, family, **overrides)
        return made[name]

    return make

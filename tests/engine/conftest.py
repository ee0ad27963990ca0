"""Tiny random models, loaded once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint
from harness import BLOCK_TOKENS

from tokenrelay.runtime.weights.loader import load_model


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The models are so small that a second thread only gets in the way."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = make_checkpoint(tmp_path_factory.mktemp("models") / "deepseek", "deepseek_v3")
    return load_model(folder, dtype=torch.float32, block_tokens=BLOCK_TOKENS)


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = make_checkpoint(tmp_path_factory.mktemp("models") / "qwen", "qwen3")
    return load_model(folder, dtype=torch.float32, block_tokens=BLOCK_TOKENS)


@pytest.fixture(scope="session", params=["deepseek", "qwen"])
def model(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)

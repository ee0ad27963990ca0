"""The kernel tests' helpers are importable here too; without triton there is nothing to test, and that is an error."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

for folder in (Path(__file__).parent, Path(__file__).parent.parent / "kernels"):
    sys.path.insert(0, str(folder))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(20261121)

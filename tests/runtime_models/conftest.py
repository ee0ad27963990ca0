"""One saved and loaded model per case, shared by all tests of a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint, make_model
from model_cases import CASES, Case

from tokenrelay.runtime.models.decoder import Model
from tokenrelay.runtime.weights.loader import load_model

torch.set_num_threads(1)  # the shapes are tiny: a second thread costs more than it gives


@dataclass
class Pair:
    """A case's folder, the transformers model and ours."""

    case: Case
    folder: Path
    hf: Any
    model: Model


@pytest.fixture(scope="session")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Pair]:
    """Builds each case once."""
    made: dict[str, Pair] = {}

    def build(case: Case) -> Pair:
        if case.name not in made:
            folder = tmp_path_factory.mktemp(case.name)
            make_checkpoint(folder, case.family, max_shard_size=case.max_shard_size, **case.overrides)
            if case.architecture is not None:
                config = json.loads((folder / "config.json").read_text())
                config["architectures"] = [case.architecture]
                (folder / "config.json").write_text(json.dumps(config))
            hf = make_model(case.family, **case.overrides)
            model = load_model(folder, dtype=torch.float32, block_tokens=16)
            made[case.name] = Pair(case, folder, hf, model)
        return made[case.name]

    return build


@pytest.fixture(params=CASES, ids=str)
def pair(request: pytest.FixtureRequest, pair_of: Callable[[Case], Pair]) -> Pair:
    """Each case in turn."""
    return pair_of(request.param)

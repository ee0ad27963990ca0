"""Perplexity of the bundled model on held-out dialogues, and what quantizing costs it."""

from __future__ import annotations

import torch

from tokenrelay.base.status import StatusPipe
from tokenrelay.cli import worker
from tokenrelay.cli.held_out import perplexity
from tokenrelay.runtime.weights.loader import load_model
from tokenrelay.services.decode.config import WorkerConfig


def test_the_trained_model_knows_its_world_and_a_shuffled_one_does_not() -> None:
    model = load_model(worker.BUNDLED_MODEL, dtype=torch.float32, context_tokens=2048)
    seen: list[int] = []
    trained = perplexity(model, worker.BUNDLED_MODEL, 2, seen.append)
    assert 1.0 < trained < 3.0 and seen == [0, 1]
    model.embed.weight[:] = model.embed.weight[torch.randperm(model.embed.weight.shape[0])]
    assert perplexity(model, worker.BUNDLED_MODEL, 1) > 20


def test_a_worker_says_what_quantizing_cost() -> None:
    said: list[dict[str, object]] = []
    before = worker.log.info
    worker.log.info = lambda event, **fields: said.append({"event": event, **fields})  # type: ignore[method-assign]
    try:
        worker.load(WorkerConfig(weight_dtype="int8", context_tokens=2048, kernels_file="none"), StatusPipe(None))
    finally:
        worker.log.info = before  # type: ignore[method-assign]
    (told,) = [one for one in said if one["event"] == "perplexity on held-out dialogues"]
    assert told["form"] == "int8" and str(told["loss"]).endswith("%")
    assert abs(float(str(told["found"])) / float(str(told["exact"])) - 1) < 0.05

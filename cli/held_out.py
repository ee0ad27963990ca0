"""The bundled model's perplexity on held-out dialogues of its own world: what quantizing costs in exactness.

Of the assistant's tokens, every one given the right text before it; nothing of these dialogues was trained on.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from tokenrelay.runtime.models.decoder import Model

DIALOGUES = 8  # at load: under a second on two processors
TOKENS_MAX = 2048  # of a dialogue


def perplexity(
    model: Model, folder: Path, dialogues: int = DIALOGUES, each: Callable[[int], object] | None = None
) -> float:
    """exp of the mean negative log-likelihood; `folder` has the model's tokenizer, `each` is told every dialogue."""
    import torch

    from tokenrelay.assets.training import corpus, tokenizer, world

    encoder, total, count = corpus.Encoder(tokenizer.load(folder)), 0.0, 0
    with torch.inference_mode():
        for index in range(dialogues):
            sample = encoder.sample(world.write_exam(index), random.Random(index))
            ids, learnt = torch.tensor(sample.ids), torch.tensor([weight >= 1.0 for weight in sample.weights])
            ids, learnt = ids[:TOKENS_MAX], learnt[:TOKENS_MAX]
            losses = torch.nn.functional.cross_entropy(_logits(model, ids)[:-1], ids[1:], reduction="none")
            total, count = total + float(losses[learnt[1:]].sum()), count + int(learnt[1:].sum())
            if each is not None:
                each(index)
    return math.exp(total / count)


def _logits(model: Model, ids: torch.Tensor) -> torch.Tensor:
    """float32 [t, vocab]: one prompt in caches of its own, logits after every token."""
    import torch

    from tokenrelay.kernels.batch import AttentionBatch

    layout = model.config.kv_layout
    tokens = len(ids)
    blocks = -(-tokens // layout.block_tokens)
    positions = torch.arange(tokens)
    batch = AttentionBatch(
        block_table=torch.arange(blocks, dtype=torch.int32)[None],
        slots=torch.zeros(1, dtype=torch.int32),
        starts=torch.zeros(1, dtype=torch.int32),
        lengths=torch.tensor([tokens], dtype=torch.int32),
        offsets=torch.tensor([0, tokens], dtype=torch.int32),
        positions=positions,
        cache_slots=positions,
        decodes=0,
        context_max=tokens,
    )
    caches = [torch.zeros(layout.shape(blocks), dtype=model.config.kv_dtype) for _ in model.layers]
    logits: torch.Tensor = model(ids, batch, caches, positions)
    return logits

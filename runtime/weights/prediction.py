"""Whether a checkpoint has a multi-token prediction layer, and whether it can be used.

prediction = find_prediction(checkpoint, architecture, dtype, "auto")      # None: there is none
"""

from __future__ import annotations

from typing import Literal

import torch

from tokenrelay.base.errors import CheckpointError
from tokenrelay.base.logging import get_logger
from tokenrelay.runtime.layers.mla import Mla
from tokenrelay.runtime.models.config import Architecture
from tokenrelay.runtime.models.prediction import Prediction
from tokenrelay.runtime.weights.checkpoint import Checkpoint

log = get_logger("weights")

Wanted = Literal["off", "auto", "on"]  # auto: where the checkpoint has it
SHARED = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
SAMPLE_BYTES = 1 << 16  # that are compared of a tensor which should be there twice


def find_prediction(
    checkpoint: Checkpoint, architecture: Architecture, dtype: torch.dtype, wanted: Wanted
) -> Prediction | None:
    """The first prediction layer, its parameters not filled. Raises CheckpointError for `on` where there is none.

    A checkpoint may have several: each predicts one token further. The first one, run on its own output, is what is
    used; DeepSeek's have one.
    """
    if wanted == "off":
        return None
    reason = _absent(checkpoint, architecture)
    if reason is None:
        layer = architecture.layers
        with torch.device("meta"):
            moe = f"model.layers.{layer}.mlp.gate.weight" in checkpoint.where
            prediction = Prediction(architecture, layer, moe=moe, dtype=dtype)
        _check_shared(checkpoint, layer, tied=architecture.tied)
        return prediction
    if wanted == "on":
        raise CheckpointError(
            f"{checkpoint.folder} has no multi-token prediction layer: {reason}", file=str(checkpoint.folder)
        )
    log.info("no multi-token prediction layer: drafts come from the text", reason=reason)
    return None


def _absent(checkpoint: Checkpoint, architecture: Architecture) -> str | None:
    """Why there is no layer to use, or None."""
    if not isinstance(architecture.attention, Mla):
        return "its architecture has none (DeepSeek-V3's has)"
    if checkpoint.config.integer("num_nextn_predict_layers", 0, minimum=0) == 0:
        return "num_nextn_predict_layers is 0 or missing in config.json (so it is in Kimi-K2's)"
    name = f"model.layers.{architecture.layers}.eh_proj.weight"
    if name not in checkpoint.where:
        return f"config.json names one, and {name} is not there (transformers drops it when it saves)"
    return None


def _check_shared(checkpoint: Checkpoint, layer: int, *, tied: bool) -> None:
    """Embedding and head lie in DeepSeek's files once more for the layer: the same bytes, which are not loaded twice.

    Raises CheckpointError where they are others.
    """
    for suffix, own in SHARED.items():
        name = f"model.layers.{layer}.{suffix}"
        model = "model.embed_tokens.weight" if tied else own
        if name not in checkpoint.where or model not in checkpoint.where:
            continue
        copy, original = checkpoint.entry(name), checkpoint.entry(model)
        same = (copy.shape, copy.dtype) == (original.shape, original.dtype)
        size = min(copy.size_bytes, SAMPLE_BYTES)
        for first in (0, (copy.size_bytes - size) // 2, copy.size_bytes - size) if same else ():
            same &= checkpoint.where[name].read(copy.first + first, size) == checkpoint.where[model].read(
                original.first + first, size
            )
        if not same:
            path = str(checkpoint.where[name].path)
            message = f"{path}: {name} is not {model}: a prediction layer with its own is not supported (drafts=ngram)"
            raise CheckpointError(message, file=path, tensor=name)

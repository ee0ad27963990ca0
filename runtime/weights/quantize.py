"""Matrices of a loaded model, kept as integers.

    quantize_model(model, "int4")      # on the CPU; the model's identity changes with it

Linear layers, experts and the vocabulary's projection (always 8 bits) change; embeddings, norms, routers and the
per-head matrices of latent attention stay as they were loaded. Perplexity and speed: docs/models.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from tokenrelay.base.errors import ConfigError
from tokenrelay.base.logging import get_logger
from tokenrelay.kernels.quantized import FORMS
from tokenrelay.runtime.layers.embedding import Head
from tokenrelay.runtime.layers.linear import Linear
from tokenrelay.runtime.layers.moe import Experts
from tokenrelay.runtime.models.decoder import Model
from tokenrelay.runtime.weights.identity import changed_identity

log = get_logger("weights")


def quantize_model(model: Model, name: str, progress: Callable[[int, int], None] | None = None) -> None:
    """Change every matrix in place; `progress(done, total)` counts modules. Raises ConfigError off the CPU."""
    if name not in FORMS:
        raise ConfigError(f"weight_dtype is {name!r}, expected auto, {', '.join(FORMS)}")
    device = model.cos_sin.device
    if device.type != "cpu":
        raise ConfigError(f"weight_dtype {name} needs the CPU: there are no kernels for it on {device} yet")
    before = weight_bytes(model)
    modules = [module for module in model.modules() if isinstance(module, Linear | Head | Experts)]
    for done, module in enumerate(modules, 1):
        module.quantize(FORMS[name])
        if progress is not None:
            progress(done, len(modules))
    # Its KV is another one's: blocks must not be shared with the model as it was.
    model.config = dataclasses.replace(model.config, identity=changed_identity(model.config.identity, name))
    log.info("weights quantized", form=name, before_bytes=before, after_bytes=weight_bytes(model))


def weight_bytes(model: Model) -> int:
    """Memory of all weights."""
    total = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    for module in model.modules():
        for kept in (getattr(module, name, None) for name in ("quantized", "packed", "scaled")):
            found = kept if isinstance(kept, tuple) else () if kept is None else (kept,)
            total += sum(weight.nbytes for weight in found)
    return total

"""Matrices of a loaded model, laid out for the widest kernels of this machine.

    pack_model(model)      # after it was loaded, and quantized where that was asked for

What the machine has no such kernels for stays as it is, as do embeddings, norms, routers and the per-head matrices of
latent attention, which are kept a second time for prompts. Results change in their last bits, nothing else does.
"""

from __future__ import annotations

from tokenrelay.runtime.layers.embedding import Head
from tokenrelay.runtime.layers.linear import Linear
from tokenrelay.runtime.layers.mla import MlaCore
from tokenrelay.runtime.layers.moe import Experts
from tokenrelay.runtime.models.decoder import Model


def pack_model(model: Model) -> None:
    """Change every matrix in place, one after the other: no second copy of the model is held."""
    for module in model.modules():
        if isinstance(module, MlaCore) or (isinstance(module, Linear | Head | Experts) and module.packed is None):
            module.pack()

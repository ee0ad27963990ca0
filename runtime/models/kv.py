"""In which dtype a model keeps its KV: its own, or float8 where there is a layout and a kernel for it.

config = in_float8(config)                       # another layout, and another identity
check_kernels(config, architecture, device)      # before the pool is allocated
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Literal

import torch

from tokenrelay.base.errors import ConfigError
from tokenrelay.base.logging import get_logger
from tokenrelay.kernels import registry
from tokenrelay.kernels.layout import MlaFp8Layout, MlaLayout
from tokenrelay.runtime.layers.mla import Mla
from tokenrelay.runtime.models.config import Architecture, ModelConfig

log = get_logger("memory")

KvDtype = Literal["auto", "fp8"]  # auto: the model's own
SETTING = "worker.kv_dtype"


def in_float8(config: ModelConfig) -> ModelConfig:
    """The model with its KV in float8 (`MlaFp8Layout`). Raises ConfigError where there is no such layout."""
    layout = config.kv_layout
    if not isinstance(layout, MlaLayout):
        raise ConfigError(
            f"{SETTING} fp8: {config.architecture} keeps keys and values of heads, and only the latents of multi-head "
            "latent attention have a layout in float8; expected auto"
        )
    try:
        small = MlaFp8Layout(rank=layout.rank, rope=layout.rope, block_tokens=layout.block_tokens)
    except ValueError as error:
        raise ConfigError(f"{SETTING} fp8: {error}") from error
    # Its KV holds other values than the model's in full precision: blocks must not be shared between the two.
    identity = hashlib.blake2b(config.identity + b"fp8", digest_size=16, person=b"tokenrelay-kv").digest()
    return replace(config, kv_layout=small, identity=identity)


def check_kernels(config: ModelConfig, architecture: Architecture, device: torch.device) -> None:
    """Raise ConfigError where no kernel here attends over caches of this dtype, with required beside supported."""
    layout, attention = config.kv_layout, architecture.attention
    if not isinstance(layout, MlaFp8Layout):
        return
    assert isinstance(attention, Mla)
    if device.type != "cpu" and config.dtype is not torch.bfloat16:
        name = str(config.dtype).removeprefix("torch.")
        raise ConfigError(f"{SETTING} fp8: kernels on {device.type} take models in bfloat16, this one is in {name}")
    common = {"heads": attention.heads, "rank": layout.rank, "rope": layout.rope}
    paged = {**common, "block_tokens": layout.block_tokens}
    slow = []
    for op, sizes in (
        ("mla_rotary_write", common),
        ("mla_decode", paged),
        ("mla_prefill", {**paged, "nope": attention.nope, "value": attention.v}),
    ):
        found = registry.explain(op, device=device.type, dtype="float8_e4m3fn", **sizes)
        if found.chosen is None:
            raise ConfigError(f"{SETTING} fp8: no kernel can run this here:\n{found}")
        if found.chosen.path == "ref/torch":
            slow.append(op)
    if slow:
        log.warning("float8 KV is read by references here: it saves memory and costs time", operations=slow)

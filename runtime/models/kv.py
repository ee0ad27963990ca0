"""In which dtype a model keeps its KV: its own, or float8 where there is a layout and a kernel for it.

config = in_float8(config)                       # another layout, and another identity
check_kernels(config, architecture, device)      # before the pool is allocated
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from tokenrelay.base.errors import ConfigError
from tokenrelay.base.logging import get_logger
from tokenrelay.kernels import registry
from tokenrelay.kernels.layout import GqaFp8Layout, GqaLayout, KvLayout, MlaFp8Layout, MlaLayout
from tokenrelay.runtime.layers.attention import Gqa
from tokenrelay.runtime.layers.mla import Mla
from tokenrelay.runtime.models.config import Architecture, ModelConfig
from tokenrelay.runtime.weights.identity import changed_identity

log = get_logger("memory")

KvDtype = Literal["auto", "fp8"]  # auto: the model's own
SETTING = "worker.kv_dtype"


def in_float8(config: ModelConfig) -> ModelConfig:
    """The model with its KV in float8 (`…Fp8Layout`). Raises ConfigError for sizes that do not fit."""
    layout = config.kv_layout
    small: KvLayout = layout
    try:
        if isinstance(layout, MlaLayout):
            small = MlaFp8Layout(rank=layout.rank, rope=layout.rope, block_tokens=layout.block_tokens)
        elif isinstance(layout, GqaLayout):
            small = GqaFp8Layout(layout.kv_heads, layout.head_dim, layout.block_tokens)
    except ValueError as error:
        raise ConfigError(f"{SETTING} fp8: {error}") from error
    # Its KV holds other values than the model's in full precision: blocks must not be shared between the two.
    return replace(config, kv_layout=small, identity=changed_identity(config.identity, "fp8", b"tokenrelay-kv"))


def check_kernels(config: ModelConfig, architecture: Architecture, device: torch.device) -> None:
    """Raise ConfigError where no kernel here attends over caches of this dtype, with required beside supported."""
    if config.kv_dtype is config.dtype:
        return
    if device.type != "cpu" and config.dtype is not torch.bfloat16:
        name = str(config.dtype).removeprefix("torch.")
        raise ConfigError(f"{SETTING} fp8: kernels on {device.type} take models in bfloat16, this one is in {name}")
    slow = []
    for op, sizes in _operations(architecture.attention, config.kv_layout.block_tokens):
        found = registry.explain(op, device=device.type, dtype="float8_e4m3fn", **sizes)
        if found.chosen is None:
            raise ConfigError(f"{SETTING} fp8: no kernel can run this here:\n{found}")
        if found.chosen.path == "ref/torch":
            slow.append(op)
    if slow:
        log.warning("float8 KV is read by references here: it saves memory and costs time", operations=slow)


def _operations(attention: Mla | Gqa, block_tokens: int) -> list[tuple[str, dict[str, int]]]:
    """What writes and reads the caches, and for which sizes."""
    paged = {"block_tokens": block_tokens}
    if isinstance(attention, Mla):
        sizes = {"heads": attention.heads, "rank": attention.kv_rank, "rope": attention.rope}
        prefill = {**sizes, **paged, "nope": attention.nope, "value": attention.v}
        return [("mla_rotary_write", sizes), ("mla_decode", {**sizes, **paged}), ("mla_prefill", prefill)]
    sizes = {"heads": attention.heads, "kv_heads": attention.kv_heads, "head_dim": attention.head_dim}
    reads = [(op, {**sizes, **paged}) for op in ("gqa_decode", "gqa_prefill")]
    return [("gqa_rotary_write", sizes), *reads]

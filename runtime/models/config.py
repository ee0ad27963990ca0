"""What a model is: the hyperparameters that its family's parser reads, and what every other part may ask."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokenrelay.base.errors import CheckpointError
from tokenrelay.kernels.layout import GqaFp8Layout, GqaLayout, KvLayout, MlaFp8Layout, MlaLayout
from tokenrelay.runtime.layers.attention import Gqa
from tokenrelay.runtime.layers.mla import Mla
from tokenrelay.runtime.layers.moe import Moe
from tokenrelay.runtime.layers.rope import Rope
from tokenrelay.runtime.models.fields import Fields

CONTEXT_TOKENS_MAX = 1 << 24
LAYERS_MAX = 4096
EXPERTS_MAX = 1 << 14


@dataclass(frozen=True)
class Architecture:
    """Hyperparameters of one decoder-only model, family by family the same words."""

    vocab_size: int
    hidden: int
    layers: int
    context_tokens: int
    mlp_width: int
    mlp_bias: bool
    norm_eps: float
    tied: bool  # the output head is the embedding's table
    rope: Rope
    attention: Gqa | Mla
    moe: Moe | None
    moe_layers: frozenset[int]  # the layers that have `moe`; the others have a dense MLP

    def kv_layout(self, block_tokens: int, tp: int = 1) -> GqaLayout | MlaLayout:
        """The layout of one layer's cache on one of `tp` ranks: heads are dealt out, latents are whole on each."""
        attention = self.attention
        if isinstance(attention, Mla):
            return MlaLayout(rank=attention.kv_rank, rope=attention.rope, block_tokens=block_tokens)
        return GqaLayout(kv_heads=attention.kv_heads // tp, head_dim=attention.head_dim, block_tokens=block_tokens)


@dataclass(frozen=True)
class ModelConfig:
    """What the engine, the services and the command line ask of a loaded model."""

    name: str  # the folder's name
    architecture: str  # for example "DeepseekV3ForCausalLM"
    vocab_size: int
    layers: int  # that this rank holds: with pipeline stages some of the model's
    context_tokens: int
    eos_token_ids: tuple[int, ...]
    kv_layout: KvLayout  # of one layer; kv_layout.shape(blocks) in `kv_dtype`
    dtype: torch.dtype
    identity: bytes  # 16 bytes: which weights in which dtype, see runtime/weights/identity.py
    prediction_layers: int = 0  # for drafts, beyond `layers`; each has KV of its own (runtime/models/prediction.py)

    @property
    def kv_dtype(self) -> torch.dtype:
        """Of the caches: the model's, unless their layout has one of its own."""
        return torch.float8_e4m3fn if isinstance(self.kv_layout, MlaFp8Layout | GqaFp8Layout) else self.dtype

    @property
    def kv_layers(self) -> int:
        """Layers that have KV in each block."""
        return self.layers + self.prediction_layers

    @property
    def kv_words(self) -> str:
        """The layout of a block, for peers to compare: the last word that they need beside dtype and identity."""
        return f"{self.kv_layout!r}{' with a prediction layer' if self.prediction_layers else ''}"


def parse_rope(fields: Fields, width: int, *, interleaved: bool) -> Rope:
    """The rotation from `rope_parameters` (transformers 5) or `rope_scaling` and `rope_theta` (before).

    Defaults are transformers' (`modeling_rope_utils.py`). Raises CheckpointError for a kind that is not computed here.
    """
    if width % 2:
        raise CheckpointError(
            f"{fields.file}: a head rotates {width} values; expected an even number", file=fields.file
        )
    table = fields.table("rope_scaling") or fields.table("rope_parameters") or Fields({}, fields.file)
    theta = table.number("rope_theta") if "rope_theta" in table else fields.number("rope_theta", 10_000.0)
    key = "rope_type" if "rope_type" in table else "type"
    table.only(key, "default", "linear", "llama3", "yarn", why="other rotary scalings are not supported")
    kind = str(table.raw(key) or "default")
    for source in (fields, table):
        source.only("partial_rotary_factor", 1, 1.0, why="partial rotation is not supported")
    context = fields.integer("max_position_embeddings")
    original = table.integer("original_max_position_embeddings", context)
    original = fields.integer("original_max_position_embeddings", original)
    factor = 1.0
    if kind == "yarn":
        factor = table.number("factor", context / original)
    elif kind != "default":
        factor = table.number("factor")
    return Rope(
        kind=kind,
        theta=theta,
        width=width,
        interleaved=interleaved,
        factor=factor,
        context_original=original,
        low_freq_factor=table.number("low_freq_factor") if kind == "llama3" else 1.0,
        high_freq_factor=table.number("high_freq_factor") if kind == "llama3" else 4.0,
        beta_fast=table.number("beta_fast", 32.0),
        beta_slow=table.number("beta_slow", 1.0),
        mscale=table.number("mscale", 0.0, above=-1e9),
        mscale_all_dim=table.number("mscale_all_dim", 0.0, above=-1e9),
        attention_factor=table.number("attention_factor") if "attention_factor" in table else None,
        truncate=table.flag("truncate", True),
    )


def refuse_unsupported(fields: Fields) -> None:
    """What no family here computes: other activations and sliding windows."""
    fields.only("hidden_act", "silu", why="other activations are not supported")
    fields.only("use_sliding_window", False, why="sliding-window attention is not supported")
    kinds = fields.texts("layer_types")
    if any(kind != "full_attention" for kind in kinds):
        fields.fail("layer_types", '"full_attention" in each layer (other kinds are not supported)')

"""Llama 3, Qwen2, Qwen3 and Qwen3-MoE: grouped-query attention, halves rotated, a gated MLP or a mixture of experts."""

from __future__ import annotations

from tokenrelay.runtime.layers.attention import Gqa
from tokenrelay.runtime.layers.moe import Moe
from tokenrelay.runtime.models.config import (
    CONTEXT_TOKENS_MAX,
    EXPERTS_MAX,
    LAYERS_MAX,
    Architecture,
    parse_rope,
    refuse_unsupported,
)
from tokenrelay.runtime.models.fields import Fields


def llama(fields: Fields) -> Architecture:
    """LlamaForCausalLM: `attention_bias` is on all four projections, `mlp_bias` on all three."""
    bias = fields.flag("attention_bias", False)
    return _dense(fields, qkv_bias=bias, out_bias=bias, qk_norm=False, mlp_bias=fields.flag("mlp_bias", False))


def qwen2(fields: Fields) -> Architecture:
    """Qwen2ForCausalLM: a bias on q, k and v and none on the output (arXiv:2407.10671)."""
    return _dense(fields, qkv_bias=True, out_bias=False, qk_norm=False)


def qwen3(fields: Fields) -> Architecture:
    """Qwen3ForCausalLM: a norm over each head's queries and keys (arXiv:2505.09388)."""
    bias = fields.flag("attention_bias", False)
    return _dense(fields, qkv_bias=bias, out_bias=bias, qk_norm=True)


def qwen3_moe(fields: Fields) -> Architecture:
    """Qwen3MoeForCausalLM: softmax over all experts, then the best; no shared expert, no groups."""
    bias = fields.flag("attention_bias", False)
    layers = fields.integer("num_hidden_layers", maximum=LAYERS_MAX)
    # transformers 5 writes the number of experts under another name than the published checkpoints.
    experts = fields.integer("num_experts" if "num_experts" in fields else "num_local_experts", maximum=EXPERTS_MAX)
    top_k = fields.integer("num_experts_per_tok")
    if top_k > experts:
        fields.fail("num_experts_per_tok", f"at most the number of experts, {experts}")
    moe = Moe(
        experts=experts,
        top_k=top_k,
        width=fields.integer("moe_intermediate_size"),
        shared_width=0,
        scoring="softmax",
        normalize=fields.flag("norm_topk_prob", False),
    )
    dense = set(fields.integers("mlp_only_layers"))
    step = fields.integer("decoder_sparse_step", 1)
    sparse = frozenset(layer for layer in range(layers) if layer not in dense and (layer + 1) % step == 0)
    return _dense(fields, qkv_bias=bias, out_bias=bias, qk_norm=True, moe=moe, moe_layers=sparse)


def _dense(
    fields: Fields,
    *,
    qkv_bias: bool,
    out_bias: bool,
    qk_norm: bool,
    mlp_bias: bool = False,
    moe: Moe | None = None,
    moe_layers: frozenset[int] = frozenset(),
) -> Architecture:
    refuse_unsupported(fields)
    hidden = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        fields.fail("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
    if "head_dim" not in fields and hidden % heads:
        fields.fail("hidden_size", f"a multiple of num_attention_heads, {heads}")
    head_dim = fields.integer("head_dim", hidden // heads)
    return Architecture(
        vocab_size=fields.integer("vocab_size"),
        hidden=hidden,
        layers=fields.integer("num_hidden_layers", maximum=LAYERS_MAX),
        context_tokens=fields.integer("max_position_embeddings", maximum=CONTEXT_TOKENS_MAX),
        mlp_width=fields.integer("intermediate_size"),
        mlp_bias=mlp_bias,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        tied=fields.flag("tie_word_embeddings", False),
        rope=parse_rope(fields, head_dim, interleaved=False),
        attention=Gqa(heads, kv_heads, head_dim, qkv_bias=qkv_bias, out_bias=out_bias, qk_norm=qk_norm),
        moe=moe,
        moe_layers=moe_layers,
    )

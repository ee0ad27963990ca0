"""DeepSeek-V2 (arXiv:2405.04434), DeepSeek-V3 (arXiv:2412.19437) and Kimi-K2, which is V3 with other numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from tokenrelay.runtime.layers.mla import Mla
from tokenrelay.runtime.layers.moe import Moe
from tokenrelay.runtime.layers.rope import mla_scale
from tokenrelay.runtime.models.config import (
    CONTEXT_TOKENS_MAX,
    EXPERTS_MAX,
    LAYERS_MAX,
    Architecture,
    parse_rope,
    refuse_unsupported,
)
from tokenrelay.runtime.models.fields import Fields


def deepseek_v3(fields: Fields) -> Architecture:
    """DeepseekV3ForCausalLM: sigmoid scores, a learnt correction for the choice, groups by their two best."""
    fields.only("topk_method", "noaux_tc", why="DeepSeek-V3's routing")
    fields.only("scoring_func", "sigmoid", why="DeepSeek-V3's routing")
    moe = _moe(fields, "sigmoid", normalize=fields.flag("norm_topk_prob", True))
    moe = replace(moe, group_score="top2", bias=True)
    groups = fields.integer("n_group", 1)
    moe = _grouped(fields, moe, groups, fields.integer("topk_group", groups))
    if moe.experts // groups < 2:
        fields.fail("n_group", "groups of at least two experts")
    return _decoder(fields, moe, interleaved=fields.flag("rope_interleave", True))


def deepseek_v2(fields: Fields) -> Architecture:
    """DeepseekV2ForCausalLM: softmax scores, greedy or limited to the groups with the best expert."""
    fields.only("scoring_func", "softmax", why="DeepSeek-V2's routing")
    fields.only("topk_method", "greedy", "group_limited_greedy", why="DeepSeek-V2's routings")
    # DeepSeek's code normalises and drops the scale, transformers ignores the flag; no published model sets it.
    fields.only("norm_topk_prob", False, why="implementations disagree on it")
    moe = _moe(fields, "softmax", normalize=False)
    if fields.raw("topk_method") == "group_limited_greedy":
        moe = _grouped(fields, moe, fields.integer("n_group"), fields.integer("topk_group"))
    return _decoder(fields, moe, interleaved=True)


def _moe(fields: Fields, scoring: Literal["softmax", "sigmoid"], *, normalize: bool) -> Moe:
    fields.only("moe_layer_freq", 1, why="other strides of dense layers are not supported")
    experts = fields.integer("n_routed_experts", maximum=EXPERTS_MAX)
    top_k = fields.integer("num_experts_per_tok")
    if top_k > experts:
        fields.fail("num_experts_per_tok", f"at most n_routed_experts, {experts}")
    width = fields.integer("moe_intermediate_size")
    return Moe(
        experts=experts,
        top_k=top_k,
        width=width,
        shared_width=width * fields.integer("n_shared_experts", 0, minimum=0),
        scoring=scoring,
        normalize=normalize,
        scale=fields.number("routed_scaling_factor", 1.0),
    )


def _grouped(fields: Fields, moe: Moe, groups: int, groups_top_k: int) -> Moe:
    if moe.experts % groups:
        fields.fail("n_group", f"a divisor of n_routed_experts, {moe.experts}")
    if groups_top_k > groups:
        fields.fail("topk_group", f"at most n_group, {groups}")
    if moe.top_k > groups_top_k * (moe.experts // groups):
        fields.fail("num_experts_per_tok", f"at most the experts of {groups_top_k} groups")
    return replace(moe, groups=groups, groups_top_k=groups_top_k)


def _decoder(fields: Fields, moe: Moe, *, interleaved: bool) -> Architecture:
    refuse_unsupported(fields)
    fields.only("mlp_bias", False, why="DeepSeek's MLPs have none")
    layers = fields.integer("num_hidden_layers", maximum=LAYERS_MAX)
    nope = fields.integer("qk_nope_head_dim")
    rope_width = fields.integer("qk_rope_head_dim")
    rope = parse_rope(fields, rope_width, interleaved=interleaved)
    attention = Mla(
        heads=fields.integer("num_attention_heads"),
        q_rank=fields.integer("q_lora_rank") if "q_lora_rank" in fields else None,
        kv_rank=fields.integer("kv_lora_rank"),
        nope=nope,
        rope=rope_width,
        v=fields.integer("v_head_dim"),
        scale=mla_scale(rope, nope + rope_width),
        interleaved=interleaved,
        bias=fields.flag("attention_bias", False),
    )
    return Architecture(
        vocab_size=fields.integer("vocab_size"),
        hidden=fields.integer("hidden_size"),
        layers=layers,
        context_tokens=fields.integer("max_position_embeddings", maximum=CONTEXT_TOKENS_MAX),
        mlp_width=fields.integer("intermediate_size"),
        mlp_bias=False,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        tied=fields.flag("tie_word_embeddings", False),
        rope=rope,
        attention=attention,
        moe=moe,
        moe_layers=frozenset(range(fields.integer("first_k_dense_replace", 0, minimum=0), layers)),
    )

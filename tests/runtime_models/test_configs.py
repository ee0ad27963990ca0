"""config.json read field by field: what published models say is understood, and every mistake is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tokenrelay.base.errors import CheckpointError
from tokenrelay.kernels.layout import GqaLayout, MlaLayout
from tokenrelay.runtime.layers.attention import Gqa
from tokenrelay.runtime.layers.mla import Mla
from tokenrelay.runtime.models.config import Architecture
from tokenrelay.runtime.models.fields import Fields
from tokenrelay.runtime.models.registry import ARCHITECTURES, architecture_of

# Hyperparameters as the model cards' config.json have them.
DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
DEEPSEEK_V2_LITE: dict[str, Any] = {
    **{k: v for k, v in DEEPSEEK_V3.items() if k not in ("q_lora_rank", "num_nextn_predict_layers")},
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "q_lora_rank": None,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_group": 1,
    "topk_method": "greedy",
}
KIMI_K2: dict[str, Any] = {
    **DEEPSEEK_V3,
    "model_type": "kimi_k2",
    "first_k_dense_replace": 1,
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_nextn_predict_layers": 0,
    "topk_group": 1,
    "routed_scaling_factor": 2.827,
    "vocab_size": 163840,
}
QWEN3_06B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_30B_A3B: dict[str, Any] = {
    **QWEN3_06B,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}


def parse(values: dict[str, Any]) -> Architecture:
    return architecture_of(Fields(values, "model/config.json"))[1]


def test_deepseek_v3() -> None:
    found = parse(DEEPSEEK_V3)
    assert isinstance(found.attention, Mla) and found.moe is not None
    assert (found.attention.q_rank, found.attention.kv_rank, found.attention.heads) == (1536, 512, 128)
    assert found.attention.interleaved
    assert (found.moe.groups, found.moe.groups_top_k, found.moe.group_score) == (8, 4, "top2")
    assert (found.moe.scoring, found.moe.bias, found.moe.normalize, found.moe.scale) == ("sigmoid", True, True, 2.5)
    assert found.moe_layers == frozenset(range(3, 61))
    assert found.kv_layout(64) == MlaLayout(rank=512, rope=64, block_tokens=64)
    assert found.kv_layout(64).shape(10) == (10, 64, 576)


def test_deepseek_v2_lite() -> None:
    found = parse(DEEPSEEK_V2_LITE)
    assert isinstance(found.attention, Mla) and found.moe is not None
    assert found.attention.q_rank is None
    assert (found.moe.groups, found.moe.scoring, found.moe.bias, found.moe.normalize) == (1, "softmax", False, False)
    assert found.moe.shared_width == 2816


def test_kimi_k2_by_architecture_and_by_model_type() -> None:
    named = parse(KIMI_K2)
    assert named.moe is not None and (named.moe.experts, named.moe.groups) == (384, 1)
    assert parse({**KIMI_K2, "architectures": None}) == named
    assert parse({**KIMI_K2, "architectures": ["KimiK2ForCausalLM"]}) == named


def test_qwen3_and_its_mixture() -> None:
    dense = parse(QWEN3_06B)
    assert dense.attention == Gqa(16, 8, 128, qk_norm=True)
    assert dense.tied and dense.moe is None
    assert dense.kv_layout(32) == GqaLayout(kv_heads=8, head_dim=128, block_tokens=32)
    sparse = parse(QWEN3_30B_A3B)
    assert sparse.moe is not None and sparse.moe.shared_width == 0
    assert sparse.moe_layers == frozenset(range(48))
    assert parse({**QWEN3_30B_A3B, "num_experts": None, "num_local_experts": 128}) == sparse


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (QWEN3_06B, {"architectures": ["GPT2LMHeadModel"]}, "unknown architecture GPT2LMHeadModel; known: "),
        (QWEN3_06B, {"architectures": None, "model_type": "gpt2"}, "unknown architecture model_type 'gpt2'; known: "),
        (QWEN3_06B, {"hidden_size": None}, "hidden_size is missing; expected an integer from 1"),
        (QWEN3_06B, {"hidden_size": "1024"}, 'hidden_size is "1024"; expected an integer'),
        (QWEN3_06B, {"hidden_size": True}, "hidden_size is true; expected an integer"),
        (QWEN3_06B, {"num_hidden_layers": 0}, "num_hidden_layers is 0; expected an integer from 1 to"),
        (QWEN3_06B, {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; expected an integer from 1 to"),
        (QWEN3_06B, {"vocab_size": -3}, "vocab_size is -3"),
        (QWEN3_06B, {"max_position_embeddings": 1 << 40}, "max_position_embeddings is 1099511627776"),
        (QWEN3_06B, {"num_key_value_heads": 3}, "num_key_value_heads is 3; expected a divisor of num_attention_heads"),
        (QWEN3_06B, {"rms_norm_eps": float("nan")}, "rms_norm_eps is NaN; expected a finite number"),
        (QWEN3_06B, {"rms_norm_eps": 0}, "rms_norm_eps is 0; expected a finite number above 0"),
        (QWEN3_06B, {"tie_word_embeddings": "yes"}, 'tie_word_embeddings is "yes"; expected true or false'),
        (QWEN3_06B, {"hidden_act": "gelu"}, 'hidden_act is "gelu"; expected "silu"'),
        (QWEN3_06B, {"use_sliding_window": True}, "sliding-window attention is not supported"),
        (QWEN3_06B, {"layer_types": ["sliding_attention"]}, "layer_types is"),
        (QWEN3_06B, {"partial_rotary_factor": 0.5}, "partial rotation is not supported"),
        (QWEN3_06B, {"head_dim": 127}, "a head rotates 127 values; expected an even number"),
        (QWEN3_06B, {"rope_scaling": []}, "rope_scaling is []; expected an object"),
        (QWEN3_06B, {"rope_scaling": {"type": "longrope"}}, 'rope_scaling.type is "longrope"; expected "default"'),
        (QWEN3_06B, {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        (QWEN3_06B, {"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope_scaling.low_freq_factor is missing"),
        (QWEN3_30B_A3B, {"num_experts": None}, "num_local_experts is missing"),
        (QWEN3_30B_A3B, {"num_experts_per_tok": 129}, "num_experts_per_tok is 129; expected at most"),
        (DEEPSEEK_V3, {"kv_lora_rank": None}, "kv_lora_rank is missing"),
        (DEEPSEEK_V3, {"q_lora_rank": 0}, "q_lora_rank is 0"),
        (DEEPSEEK_V3, {"n_group": 7}, "n_group is 7; expected a divisor of n_routed_experts, 256"),
        (DEEPSEEK_V3, {"n_group": 256, "topk_group": 8}, "n_group is 256; expected groups of at least two experts"),
        (DEEPSEEK_V3, {"topk_group": 9}, "topk_group is 9; expected at most n_group, 8"),
        (DEEPSEEK_V3, {"num_experts_per_tok": 200, "topk_group": 1}, "num_experts_per_tok is 200; expected at most"),
        (DEEPSEEK_V3, {"scoring_func": "softmax"}, 'scoring_func is "softmax"; expected "sigmoid"'),
        (DEEPSEEK_V3, {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        (DEEPSEEK_V2_LITE, {"topk_method": "random"}, 'topk_method is "random"'),
        (DEEPSEEK_V2_LITE, {"topk_method": "group_limited_greedy", "n_group": None}, "n_group is missing"),
        (DEEPSEEK_V2_LITE, {"norm_topk_prob": True}, "norm_topk_prob is true"),
    ],
)
def test_what_is_wrong_is_named(base: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse({**base, **change})
    assert message in caught.value.message
    assert caught.value.message.startswith("model/config.json: ")
    assert caught.value.file == "model/config.json"


def test_an_unknown_architecture_lists_the_known_ones() -> None:
    with pytest.raises(CheckpointError) as caught:
        parse({"architectures": ["Nope"]})
    assert all(name in caught.value.message for name in ARCHITECTURES)


def test_a_file_that_is_no_configuration(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for content, message in [
        (b"{", "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (b"[1]", "holds list, expected a JSON object"),
        (b"[" * 200_000, "nested too deeply"),
        (b"", "is not valid JSON"),
    ]:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message) as caught:
            Fields.read(path)
        assert str(path) in caught.value.message
    path.unlink()
    with pytest.raises(CheckpointError, match="does not exist"):
        Fields.read(path)


def test_integers_and_texts() -> None:
    fields = Fields(json.loads('{"a": 3, "b": [1, 2], "c": [1, -1], "d": "x", "e": [1]}'), "f")
    assert fields.integers("a") == (3,)
    assert fields.integers("b") == (1, 2)
    assert fields.integers("missing") == ()
    assert fields.texts("d") == ("x",)
    with pytest.raises(CheckpointError, match="c is"):
        fields.integers("c")
    with pytest.raises(CheckpointError, match="e is"):
        fields.texts("e")

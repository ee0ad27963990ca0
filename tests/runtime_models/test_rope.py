"""The rotary table against transformers' own, bit by bit, and YaRN's corrections."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tokenrelay.runtime.layers.mla import Mla
from tokenrelay.runtime.layers.rope import cos_sin_table, frequencies_of
from tokenrelay.runtime.models.fields import Fields
from tokenrelay.runtime.models.registry import architecture_of

# What published checkpoints carry (before transformers 5: rope_scaling and rope_theta side by side).
DEEPSEEK_V3 = {
    "rope_theta": 10000,
    "max_position_embeddings": 163840,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
}
DEEPSEEK_V2 = {
    **DEEPSEEK_V3,
    "num_experts_per_tok": 6,
    "rope_scaling": {**DEEPSEEK_V3["rope_scaling"], "mscale": 0.707, "mscale_all_dim": 0.707},  # type: ignore[dict-item]
}
KIMI_K2 = {
    **DEEPSEEK_V3,
    "rope_theta": 50000.0,
    "max_position_embeddings": 131072,
    "rope_scaling": {**DEEPSEEK_V3["rope_scaling"], "factor": 32.0, "beta_fast": 1.0},  # type: ignore[dict-item]
}
LLAMA_31 = {
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
QWEN_YARN = {
    "rope_theta": 1000000.0,
    "max_position_embeddings": 32768,
    "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
}
YARN_EXTRAS = {
    "rope_theta": 10000.0,
    "max_position_embeddings": 8192,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 512,
        "attention_factor": 1.3,
        "truncate": False,
    },
}
LINEAR = {"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}
PLAIN = {"rope_theta": 1000000, "max_position_embeddings": 40960}

PUBLISHED: list[tuple[str, str, dict[str, Any]]] = [
    ("deepseek-v3", "DeepseekV3Config", DEEPSEEK_V3),
    ("deepseek-v2", "DeepseekV2Config", DEEPSEEK_V2),
    ("kimi-k2", "DeepseekV3Config", KIMI_K2),
    ("llama-3.1", "LlamaConfig", LLAMA_31),
    ("qwen3-yarn", "Qwen3Config", QWEN_YARN),
    ("yarn-extras", "Qwen3Config", YARN_EXTRAS),
    ("linear", "LlamaConfig", LINEAR),
    ("plain", "Qwen2Config", PLAIN),
]


@pytest.mark.parametrize(("name", "config_class", "overrides"), PUBLISHED, ids=[name for name, _, _ in PUBLISHED])
@pytest.mark.parametrize("style", ["published", "transformers 5"])
def test_frequencies_are_those_of_transformers(
    tmp_path: Path, name: str, config_class: str, overrides: dict[str, Any], style: str
) -> None:
    config = getattr(transformers, config_class)(**overrides)
    architecture_name = config_class.replace("Config", "ForCausalLM")
    config.architectures = [architecture_name]
    config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    if style == "published":
        values.pop("rope_parameters", None)
        values.update(overrides)
    rope = architecture_of(Fields(values, "config.json"))[1].rope
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        width = rope.width
        expected = 1.0 / (config.rope_parameters["rope_theta"] ** (torch.arange(0, width, 2).float() / width))
        factor = 1.0
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    found, found_factor = frequencies_of(rope)
    assert torch.equal(found, expected)
    assert found_factor == pytest.approx(factor, abs=0)
    table = cos_sin_table(rope, 300, torch.device("cpu"))
    angles = torch.arange(300)[:, None].float() * expected
    assert torch.equal(table, torch.cat([angles.cos() * factor, angles.sin() * factor], -1))


def test_deepseek_v3_scales_its_softmax_by_mscale_squared(tmp_path: Path) -> None:
    transformers.DeepseekV3Config(**DEEPSEEK_V3).save_pretrained(tmp_path)
    values = {**json.loads((tmp_path / "config.json").read_text()), "architectures": ["DeepseekV3ForCausalLM"]}
    attention = architecture_of(Fields(values, "config.json"))[1].attention
    assert isinstance(attention, Mla)
    mscale = 0.1 * math.log(40) + 1.0
    assert attention.scale == pytest.approx(192**-0.5 * mscale * mscale, rel=1e-12)

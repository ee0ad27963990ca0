"""Which architectures are known, by the names that config.json uses."""

from __future__ import annotations

from collections.abc import Callable

from tokenrelay.base.errors import CheckpointError
from tokenrelay.runtime.models.config import Architecture
from tokenrelay.runtime.models.fields import Fields
from tokenrelay.runtime.models.gqa_families import llama, qwen2, qwen3, qwen3_moe
from tokenrelay.runtime.models.mla_families import deepseek_v2, deepseek_v3

Parser = Callable[[Fields], Architecture]

ARCHITECTURES: dict[str, Parser] = {
    "DeepseekV2ForCausalLM": deepseek_v2,
    "DeepseekV3ForCausalLM": deepseek_v3,
    "KimiK2ForCausalLM": deepseek_v3,
    "LlamaForCausalLM": llama,
    "Qwen2ForCausalLM": qwen2,
    "Qwen3ForCausalLM": qwen3,
    "Qwen3MoeForCausalLM": qwen3_moe,
}
# For a config.json that names no architecture.
MODEL_TYPES: dict[str, str] = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "kimi_k2": "KimiK2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


def architecture_of(fields: Fields) -> tuple[str, Architecture]:
    """The architecture's name and its hyperparameters. Raises CheckpointError that lists the known names."""
    named = fields.texts("architectures")
    known = next((name for name in named if name in ARCHITECTURES), None)
    if known is None and not named:
        known = MODEL_TYPES.get(str(fields.raw("model_type")))
    if known is None:
        found = ", ".join(named) or f"model_type {fields.raw('model_type')!r}"
        raise CheckpointError(
            f"{fields.file}: unknown architecture {found}; known: {', '.join(ARCHITECTURES)}", file=fields.file
        )
    return known, ARCHITECTURES[known](fields)

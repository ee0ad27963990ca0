"""Small random-weight checkpoint folders of every family, with a tokenizer and a chat template, for any test.

    folder = make_checkpoint(tmp_path / "m", "deepseek_v3")
    folder = make_checkpoint(tmp_path / "q", "qwen3", num_hidden_layers=3, max_shard_size="50KB")

Weights are drawn so that every part matters: transformers' own initialisation (0.02) leaves attention so weak that a
wrong rotation would hide below a tolerance.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB = 384
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EOS = SPECIAL.index("<|im_end|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": None,
}
_MLA: dict[str, Any] = {
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
}
_GQA: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 16}

# family -> (configuration class, model class, its small defaults)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "deepseek_v2": ("DeepseekV2Config", "DeepseekV2ForCausalLM", {**_MLA, "routed_scaling_factor": 1.5}),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {**_MLA, "q_lora_rank": 24, "n_group": 4, "topk_group": 2},
    ),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _GQA),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _GQA),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {**_GQA, "moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True},
    ),
}


def make_checkpoint(
    folder: Path,
    family: str,
    *,
    seed: int = 0,
    max_shard_size: str = "1GB",
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> Path:
    """Write a checkpoint of `family` (a key of FAMILIES) to `folder`; `overrides` go into its configuration."""
    model = make_model(family, seed=seed, **overrides).to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    write_tokenizer(folder, int(model.config.max_position_embeddings))
    return folder


def make_model(family: str, *, seed: int = 0, **overrides: Any) -> Any:
    """The transformers model of `family` with random weights, float32, in evaluation mode."""
    config_name, model_name, defaults = FAMILIES[family]
    config = getattr(transformers, config_name)(**{**_COMMON, **defaults, **overrides})
    model = getattr(transformers, model_name)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("e_score_correction_bias"):
                tensor.copy_(noise * 0.1)
            elif "inv_freq" in name:
                continue
            elif "norm" in name:
                tensor.copy_(1 + noise * 0.2)
            elif name.endswith("bias"):
                tensor.copy_(noise * 0.5)
            elif "embed_tokens" in name:
                tensor.copy_(noise)
            else:
                tensor.copy_(noise * 1.5 / tensor.shape[-1] ** 0.5)
    return model


def write_tokenizer(folder: Path, context_tokens: int = 4096) -> None:
    """A byte-level BPE of at most VOCAB tokens and a ChatML template. Ids 0, 1 and 2 are SPECIAL."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "system user assistant tool the agent reads a file and writes the answer to the user, then it calls a tool "
    tokenizer.train_from_iterator([text * 2], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": context_tokens,
        "add_bos_token": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")

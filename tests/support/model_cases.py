"""The configurations that parity is shown on, and how logits and greedy text of transformers are had and compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 1e-4  # of the largest logit, in float32


@dataclass(frozen=True)
class Case:
    """A family, what differs from its small defaults, and how it is saved."""

    name: str
    family: str
    overrides: dict[str, Any] = field(default_factory=dict)
    max_shard_size: str = "1GB"
    architecture: str | None = None  # written into config.json in place of transformers' word

    def __str__(self) -> str:
        return self.name


YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.707,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GROUPED = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}

CASES = [
    Case("v2-greedy", "deepseek_v2"),
    Case("v2-grouped-qlora-yarn", "deepseek_v2", {**GROUPED, "q_lora_rank": 24, "rope_parameters": YARN}),
    Case("v2-no-dense-layer", "deepseek_v2", {"first_k_dense_replace": 0, "n_shared_experts": 2}),
    Case("v3", "deepseek_v3", {"num_hidden_layers": 3}),
    Case("v3-direct-q-yarn", "deepseek_v3", {"q_lora_rank": None, "rope_parameters": YARN}),
    Case("v3-halves-bias", "deepseek_v3", {"rope_interleave": False, "attention_bias": True, "norm_topk_prob": False}),
    Case("kimi-k2", "deepseek_v3", {"n_group": 1, "topk_group": 1}, architecture="KimiK2ForCausalLM"),
    Case("llama3-scaled", "llama", {"rope_parameters": LLAMA3, "num_hidden_layers": 3}),
    Case("llama-biased-tied", "llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    Case("qwen2", "qwen2"),
    Case("qwen2-tied-yarn", "qwen2", {"tie_word_embeddings": True, "rope_parameters": {**YARN, "mscale": None}}),
    Case("qwen3-sharded", "qwen3", max_shard_size="60KB"),
    Case("qwen3-tied", "qwen3", {"tie_word_embeddings": True}),
    Case("qwen3-moe-sharded", "qwen3_moe", {"norm_topk_prob": False}, max_shard_size="60KB"),
    Case("qwen3-moe-mixed", "qwen3_moe", {"num_hidden_layers": 3, "decoder_sparse_step": 2, "mlp_only_layers": [0]}),
]


def reference_logits(hf: Any, tokens: list[int]) -> Tensor:
    """float32 [len(tokens), vocab] of the transformers model, in one pass."""
    with torch.no_grad():
        logits: Tensor = hf(torch.tensor([tokens])).logits[0]
    return logits


def reference_greedy(hf: Any, prompt: list[int], tokens_max: int) -> tuple[list[int], list[float]]:
    """Greedy tokens of the transformers model and, for each, the gap between its two best logits."""
    tokens, gaps = [], []
    past, inputs = None, torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(tokens_max):
            out = hf(inputs, past_key_values=past, use_cache=True)
            past = out.past_key_values
            best = out.logits[0, -1].topk(2)
            tokens.append(int(best.indices[0]))
            gaps.append(float(best.values[0] - best.values[1]))
            inputs = torch.tensor([[tokens[-1]]])
    return tokens, gaps


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude; infinite where `found` is not finite."""
    assert found.shape == expected.shape, f"{tuple(found.shape)} instead of {tuple(expected.shape)}"
    if not bool(found.isfinite().all()):
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max())


def assert_close(found: Tensor, expected: Tensor, what: str = "logits") -> None:
    """Fail beyond TOLERANCE."""
    error = relative_error(found, expected)
    assert error <= TOLERANCE, f"{what}: relative error {error:.2e}, at most {TOLERANCE:.0e}"

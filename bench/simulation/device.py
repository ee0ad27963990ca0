"""The modelled device of bench/replay.py: how long a step takes, from published figures. Standard library only.

    step = fixed + max(weights read, matrix products of all tokens) + KV read by decode rows + attention of prefill rows

A roofline: reads at a share of the memory's rate, products at a share of the peak. Rows of one token are decodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One GPU that serves one model. Times in seconds, sizes in bytes."""

    name: str
    memory_bytes: float
    bytes_per_s: float
    flops_per_s: float  # of the matrix products
    attention_flops_per_s: float
    weights_bytes: float
    parameters: float  # that each token is multiplied with
    layers: int
    heads: int
    head_dim: int
    kv_bytes_per_token: float
    fixed_s: float = 0.0003  # launches, sampling, the host
    read_share: float = 0.8  # of the memory's rate that is reached
    product_share: float = 0.5  # of the peak
    attention_share: float = 0.4

    def step_s(self, decode_rows: int, decode_context: int, prefills: Sequence[tuple[int, int]]) -> float:
        """`decode_context`: tokens that the decode rows read together; `prefills`: (tokens before, tokens) of a row."""
        tokens = decode_rows + sum(length for _, length in prefills)
        reads_per_s = self.bytes_per_s * self.read_share
        linear_s = max(
            self.weights_bytes / reads_per_s, 2 * self.parameters * tokens / (self.flops_per_s * self.product_share)
        )
        pairs = sum(length * start + length * length / 2 for start, length in prefills)
        attention_flops = 4 * self.layers * self.heads * self.head_dim * pairs
        return (
            self.fixed_s
            + linear_s
            + decode_context * self.kv_bytes_per_token / reads_per_s
            + attention_flops / (self.attention_flops_per_s * self.attention_share)
        )

    def kv_blocks(self, block_tokens: int) -> int:
        """Blocks that fit beside the weights, with a tenth of the memory and 6 GB for activations left alone."""
        room = self.memory_bytes * 0.9 - self.weights_bytes - 6e9
        return int(room / (self.kv_bytes_per_token * block_tokens))


# NVIDIA H200 SXM data sheet: 141 GB, 4.8 TB/s, dense 1,979 TFLOPS in FP8 and 989 in BF16. Llama-3.1-8B's config.json:
# 32 layers, 32 heads of 128, 8 KV heads; 8.03 G parameters, weights in FP8 (embeddings in BF16), KV in FP8.
H200_LLAMA_8B = Device(
    name="H200, Llama-3.1-8B in FP8",
    memory_bytes=141e9,
    bytes_per_s=4.8e12,
    flops_per_s=1.979e15,
    attention_flops_per_s=0.989e15,
    weights_bytes=9.1e9,
    parameters=7.5e9,
    layers=32,
    heads=32,
    head_dim=128,
    kv_bytes_per_token=2 * 32 * 8 * 128,
)
DEVICES = {"h200-llama8b": H200_LLAMA_8B}

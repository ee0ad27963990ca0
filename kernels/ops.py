"""The operations that models are built from. Each dispatches to the best kernel for its tensors (see `registry`).

Inference only: none of them records gradients. Shapes use t tokens, n rows, h query heads, hk KV heads, hd head_dim,
V vocabulary, E experts. Arithmetic is in float32 at least, results come back in the type of the leading argument.
A wrong shape, type or index is a ValueError (from CPU kernels) or torch's own error (from references); a combination
that no kernel supports is a KernelUnavailable that prints required beside supported.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from tokenrelay.kernels.batch import AttentionBatch, PenaltyBatch, SamplingBatch
from tokenrelay.kernels.packed import PackedHeads, PackedWeight
from tokenrelay.kernels.quantized import QuantizedWeight
from tokenrelay.kernels.registry import pick
from tokenrelay.kernels.scaled import BlockScaledWeight

__all__ = [
    "AttentionBatch",
    "PenaltyBatch",
    "SamplingBatch",
    "add_rms_norm",
    "apply_penalties",
    "finite_rows",
    "gqa_cache_write",
    "gqa_decode",
    "gqa_prefill",
    "gqa_rotary_write",
    "linear",
    "mla_absorb",
    "mla_cache_write",
    "mla_decode",
    "mla_expand",
    "mla_prefill",
    "mla_rotary_write",
    "moe",
    "moe_route",
    "packed_linear",
    "packed_moe",
    "quantized_linear",
    "quantized_moe",
    "rms_norm",
    "rotary",
    "sample",
    "scaled_linear",
    "scaled_moe",
    "silu_mul",
    "token_logprobs",
]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich 2019).

    x [t, d] f32 or bf16, weight [d] of x's type -> [t, d]. The product with `weight` is rounded once, at the end.
    """
    result: Tensor = pick("rms_norm", x.device.type, x.dtype, x.shape[-1])(x, weight, eps)
    return result


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """A residual addition and the norm after it: (rms_norm(x + residual), x + residual).

    x, residual [t, d], weight [d], one type. The sum is rounded to that type before the norm reads it, so the fused
    operation equals the two it replaces. Neither input is changed.
    """
    result: tuple[Tensor, Tensor] = pick("add_rms_norm", x.device.type, x.dtype, x.shape[-1])(x, residual, weight, eps)
    return result


def rotary(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (Su et al. 2021) of queries and keys.

    q [t, h, r], k [t, hk, r] of one type, any strides with a contiguous last axis; positions int64 [t]; cos_sin f32
    [p, r] with the r / 2 cosines then the r / 2 sines of each position. Pairs are (2i, 2i + 1) where `interleaved`
    (GPT-J, DeepSeek checkpoints), else (i, i + r / 2) (Llama in transformers), and stay where they are.
    Returns new tensors [t, h, r] and [t, hk, r]. A position outside the table is an error.
    """
    result: tuple[Tensor, Tensor] = pick("rotary", q.device.type, q.dtype, q.shape[-1])(
        q, k, positions, cos_sin, interleaved
    )
    return result


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, SwiGLU): gate_up [t, 2f], the gate half first -> [t, f]."""
    result: Tensor = pick("silu_mul", gate_up.device.type, gate_up.dtype, gate_up.shape[-1])(gate_up)
    return result


def mla_cache_write(latent: Tensor, k_rope: Tensor, cache: Tensor, cache_slots: Tensor) -> None:
    """Write tokens into a layer's MLA cache.

    latent [t, rank], k_rope [t, rope], cache [blocks, block_tokens, rank + rope] of one type, cache_slots int64 [t] =
    block * block_tokens + offset, each at most once; a token with a negative one is written nowhere.
    """
    pick("mla_cache_write", cache.device.type, cache.dtype, latent.shape[-1], k_rope.shape[-1])(
        latent, k_rope, cache, cache_slots
    )


def gqa_cache_write(k: Tensor, v: Tensor, cache: Tensor, cache_slots: Tensor) -> None:
    """Write tokens into a layer's GQA cache.

    k, v [t, hk, hd], cache [blocks, 2, hk, block_tokens, hd] of one type, cache_slots as in `mla_cache_write`.
    """
    pick("gqa_cache_write", cache.device.type, cache.dtype, k.shape[1], k.shape[2])(k, v, cache, cache_slots)


def gqa_rotary_write(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cos_sin: Tensor, cache: Tensor, cache_slots: Tensor
) -> Tensor:
    """`rotary` (halves) and `gqa_cache_write` of the rotated keys as one operation, with the bits of the two.

    q [t, h, hd], k, v [t, hk, hd] of the cache's type, any strides with a contiguous last axis; positions int64 [t],
    cos_sin f32 [p, hd], cache and cache_slots as there -> the rotated queries [t, h, hd].
    """
    result: Tensor = pick("gqa_rotary_write", cache.device.type, cache.dtype, q.shape[1], k.shape[1], q.shape[2])(
        q, k, v, positions, cos_sin, cache, cache_slots
    )
    return result


def mla_rotary_write(
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    interleaved: bool,
    cache: Tensor,
    cache_slots: Tensor,
) -> Tensor:
    """`rotary` and `mla_cache_write` of the rotated key part as one operation, with the bits of the two.

    q_rope [t, h, rope], latent [t, rank] (normed), k_rope [t, rope], any strides with a contiguous last axis; the rest
    as there -> the rotated queries' part [t, h, rope].
    """
    result: Tensor = pick(
        "mla_rotary_write", cache.device.type, cache.dtype, q_rope.shape[1], latent.shape[1], q_rope.shape[2]
    )(q_rope, latent, k_rope, positions, cos_sin, interleaved, cache, cache_slots)
    return result


def mla_absorb(q_nope: Tensor, w_uk: Tensor, packed: PackedHeads | None = None) -> Tensor:
    """Queries in the space of latents: q_nope [t, h, nope], w_uk [h, nope, rank] of one type -> [t, h, rank].

    `packed`: the same matrix again, for kernels that read it so.
    """
    heads, nope, rank = w_uk.shape
    result: Tensor = pick("mla_absorb", q_nope.device.type, q_nope.dtype, heads, nope, rank)(q_nope, w_uk, packed)
    return result


def mla_expand(latent: Tensor, w_uv: Tensor, packed: PackedHeads | None = None) -> Tensor:
    """Attended latents as values: latent [t, h, rank], w_uv [h, v, rank] of one type -> [t, h, v].

    `packed`: as for `mla_absorb`.
    """
    heads, value, rank = w_uv.shape
    result: Tensor = pick("mla_expand", latent.device.type, latent.dtype, heads, value, rank)(latent, w_uv, packed)
    return result


def mla_decode(q_latent: Tensor, q_rope: Tensor, cache: Tensor, batch: AttentionBatch, scale: float) -> Tensor:
    """Multi-head latent attention of rows [0, batch.decodes), absorbed (DeepSeek-V2, arXiv 2405.04434).

    q_latent [n, h, rank] (queries multiplied by w_uk), q_rope [n, h, rope], cache [blocks, block_tokens, rank + rope]
    of one type, n = batch.decodes. Attends to starts + 1 cached tokens, this step's included: write them first.
    -> [n, h, rank] attention over the latents, which the caller multiplies by w_uv.
    """
    result: Tensor = pick(
        "mla_decode",
        cache.device.type,
        cache.dtype,
        q_latent.shape[1],
        q_latent.shape[2],
        q_rope.shape[2],
        cache.shape[1],
    )(q_latent, q_rope, cache, batch, scale)
    return result


def mla_prefill(
    q_nope: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    batch: AttentionBatch,
    w_uk: Tensor,
    w_uv: Tensor,
    scale: float,
    packed: PackedHeads | None = None,
) -> Tensor:
    """Multi-head latent attention of rows [batch.decodes, n): causal, over the prefix and this step's tokens.

    q_nope [t, h, nope], q_rope [t, h, rope] hold only these rows' tokens (the step's tokens from `decodes` on); cache
    as in `mla_decode`, with this step's tokens written; w_uk [h, nope, rank], w_uv [h, v, rank] -> [t, h, v].
    `packed`: both of them again, for kernels that read them so.
    """
    result: Tensor = pick(
        "mla_prefill",
        cache.device.type,
        cache.dtype,
        q_nope.shape[1],
        w_uk.shape[2],
        q_rope.shape[2],
        cache.shape[1],
        q_nope.shape[2],
        w_uv.shape[1],
    )(q_nope, q_rope, cache, batch, w_uk, w_uv, scale, packed)
    return result


def gqa_decode(q: Tensor, cache: Tensor, batch: AttentionBatch, scale: float) -> Tensor:
    """Grouped-query attention (Ainslie et al. 2023) of rows [0, batch.decodes).

    q [n, h, hd], cache [blocks, 2, hk, block_tokens, hd] of one type, h a multiple of hk; query head i reads KV head
    i // (h / hk). Attends to starts + 1 cached tokens -> [n, h, hd].
    """
    result: Tensor = pick(
        "gqa_decode", cache.device.type, cache.dtype, q.shape[1], cache.shape[2], q.shape[2], cache.shape[3]
    )(q, cache, batch, scale)
    return result


def gqa_prefill(q: Tensor, cache: Tensor, batch: AttentionBatch, scale: float) -> Tensor:
    """Grouped-query attention of rows [batch.decodes, n): causal, over the prefix and this step's tokens.

    q [t, h, hd] holds only these rows' tokens; cache as in `gqa_decode`, with this step's tokens written -> [t, h, hd].
    """
    result: Tensor = pick(
        "gqa_prefill", cache.device.type, cache.dtype, q.shape[1], cache.shape[2], q.shape[2], cache.shape[3]
    )(q, cache, batch, scale)
    return result


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, wide: bool = False) -> Tensor:
    """x weight^T + bias: x [t, d], weight [n, d], bias [n] of one type -> [t, n], float32 where `wide` (logits)."""
    result: Tensor = pick("linear", x.device.type, x.dtype, weight.shape[1], weight.shape[0])(
        x, weight, bias, wide=wide
    )
    return result


def quantized_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, *, wide: bool = False) -> Tensor:
    """x weight^T + bias with integer weights: x [t, d], bias [n] of x's type -> [t, n], float32 where `wide`.

    The CPU's kernels round activations too: to signed bytes, scaled by the largest of each 128.
    """
    columns, bits, group = weight.scales.shape[0], weight.bits, weight.group
    result: Tensor = pick("quantized_linear", x.device.type, x.dtype, weight.width, columns, bits, group)(
        x, weight, bias, wide=wide
    )
    return result


def scaled_linear(x: Tensor, weight: BlockScaledWeight, bias: Tensor | None = None, *, wide: bool = False) -> Tensor:
    """As `linear`, with float8 weights [n, d] and a factor for each 128 x 128: x [t, d], bias [n] of x's type.

    Kernels round activations to float8 too, scaled by the largest of each 128; the reference does not.
    """
    result: Tensor = pick("scaled_linear", x.device.type, x.dtype, weight.width, weight.data.shape[0])(
        x, weight, bias, wide=wide
    )
    return result


def packed_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, wide: bool = False) -> Tensor:
    """As `linear` (bfloat16) or `quantized_linear` (integers), with weights in the order in which they are read."""
    result: Tensor = pick(
        "packed_linear", x.device.type, x.dtype, weight.width, weight.columns, weight.bits, weight.group
    )(x, weight, bias, wide=wide)
    return result


def moe(x: Tensor, experts: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """The chosen experts' SwiGLU networks, summed by weight.

    x [t, d], experts int32 [t, k] (-1: none, for those that live on another rank), weights f32 [t, k],
    w_gate_up [E, 2f, d] (gate rows first), w_down [E, d, f] of x's type -> [t, d]. Experts nobody chose are not read.
    """
    result: Tensor = pick("moe", x.device.type, x.dtype, w_gate_up.shape[0], x.shape[-1], w_down.shape[2])(
        x, experts, weights, w_gate_up, w_down
    )
    return result


def quantized_moe(
    x: Tensor, experts: Tensor, weights: Tensor, w_gate_up: QuantizedWeight, w_down: QuantizedWeight
) -> Tensor:
    """As `moe`, with integer weights: w_gate_up [E, 2f, d], w_down [E, d, f]. See `quantized_linear`."""
    sizes = (w_gate_up.scales.shape[0], x.shape[-1], w_down.width, w_down.bits, w_down.group)
    result: Tensor = pick("quantized_moe", x.device.type, x.dtype, *sizes)(x, experts, weights, w_gate_up, w_down)
    return result


def packed_moe(x: Tensor, experts: Tensor, weights: Tensor, w_gate_up: PackedWeight, w_down: PackedWeight) -> Tensor:
    """As `moe` or `quantized_moe`, with packed w_gate_up [E, 2f, d] and w_down [E, d, f]; d, f: multiples of 16."""
    sizes = (w_down.experts, x.shape[-1], w_down.width, w_down.bits, w_down.group)
    result: Tensor = pick("packed_moe", x.device.type, x.dtype, *sizes)(x, experts, weights, w_gate_up, w_down)
    return result


def scaled_moe(
    x: Tensor, experts: Tensor, weights: Tensor, w_gate_up: BlockScaledWeight, w_down: BlockScaledWeight
) -> Tensor:
    """As `moe`, with weights in float8 and a factor for each 128 x 128 (DeepSeek-V3, arXiv 2412.19437, section 3.3):
    w_gate_up [E, 2f, d], w_down [E, d, f]. Kernels round activations to float8 too, scaled by the largest of each 128.
    """
    sizes = (w_down.data.shape[0], x.shape[-1], w_down.data.shape[2])
    result: Tensor = pick("scaled_moe", x.device.type, x.dtype, *sizes)(x, experts, weights, w_gate_up, w_down)
    return result


def moe_route(
    logits: Tensor,
    bias: Tensor | None,
    *,
    top_k: int,
    groups: int = 1,
    groups_top_k: int = 1,
    scoring: Literal["softmax", "sigmoid"],
    normalize: bool,
    scale: float = 1.0,
    group_score: Literal["max", "top2"] = "max",
) -> tuple[Tensor, Tensor]:
    """Choose top_k experts a token (DeepSeek-V2 section 2.2, DeepSeek-V3 section 2.1.2; one group: Qwen3-MoE).

    logits f32 [t, E], bias f32 [E] or None. Scores are the softmax or sigmoid of the logits; experts are ranked by
    score + bias, inside the groups_top_k best of `groups` equal groups, a group's score being its best expert ("max")
    or the sum of its best two ("top2"). The lower id wins among equals. Weights are the scores (without bias), divided
    by their sum + 1e-20 where `normalize`, times `scale` -> (experts int32 [t, top_k], weights f32 [t, top_k]), best
    first.
    """
    result: tuple[Tensor, Tensor] = pick("moe_route", logits.device.type, logits.dtype, logits.shape[-1])(
        logits,
        bias,
        top_k=top_k,
        groups=groups,
        groups_top_k=groups_top_k,
        scoring=scoring,
        normalize=normalize,
        scale=scale,
        group_score=group_score,
    )
    return result


def sample(logits: Tensor, params: SamplingBatch) -> Tensor:
    """Choose a token for each row -> int64 [s].

    logits f32 [s, V], V at most 2^20. Greedy (the lowest id among equals) where the temperature is not above 0. Else in
    this order: divide by the temperature; min_p keeps tokens at least min_p times as likely as the likeliest; top_k the
    k likeliest (the lower id first among equals); top_p the fewest likeliest whose probability among the kept reaches
    top_p. One of the kept is drawn by a counter-based random number keyed by (seed, choice, position): the same key and
    logits give the same token on every machine and by every kernel. A NaN counts as -inf; a row of only -inf gives 0.
    """
    result: Tensor = pick("sample", logits.device.type, logits.dtype, logits.shape[-1])(logits, params)
    return result


def token_logprobs(logits: Tensor, token_ids: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of chosen tokens and of the likeliest ones.

    logits f32 [s, V], token_ids int64 [s] -> (logprob f32 [s], top_ids int64 [s, k], top_logprobs f32 [s, k]),
    likeliest first, the lower id first among equals; k = top_k, from 0 to V.
    """
    result: tuple[Tensor, Tensor, Tensor] = pick("token_logprobs", logits.device.type, logits.dtype, logits.shape[-1])(
        logits, token_ids, top_k
    )
    return result


def apply_penalties(logits: Tensor, penalties: PenaltyBatch) -> None:
    """Change the logits f32 [s, V] of some rows in place, before sampling.

    For each token seen in prompt or output, divide a positive logit by the repetition penalty and multiply another one
    by it (Keskar et al. 2019, CTRL); then subtract frequency * count + presence * (count > 0), counted in the output
    only (OpenAI API reference); then add the biases.
    """
    pick("apply_penalties", logits.device.type, logits.dtype, logits.shape[-1])(logits, penalties)


def finite_rows(logits: Tensor) -> Tensor:
    """Which rows of the logits f32 [s, V] are finite throughout -> bool [s]."""
    result: Tensor = pick("finite_rows", logits.device.type, logits.dtype, logits.shape[-1])(logits)
    return result

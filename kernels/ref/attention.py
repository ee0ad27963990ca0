"""Paged attention, row by row: gather the row's cache, mask, softmax in float32 at least."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenrelay.kernels.batch import AttentionBatch
from tokenrelay.kernels.ref import fp8
from tokenrelay.kernels.ref.elementwise import accumulate
from tokenrelay.kernels.registry import register


@register(op="mla_absorb", path="ref/torch", device="any", priority=0, invariant=False)
def mla_absorb(q_nope: Tensor, w_uk: Tensor, packed: object = None) -> Tensor:
    """See `ops.mla_absorb`. Reads the plain matrix."""
    return torch.bmm(q_nope.transpose(0, 1), w_uk).transpose(0, 1)


@register(op="mla_expand", path="ref/torch", device="any", priority=0, invariant=False)
def mla_expand(latent: Tensor, w_uv: Tensor, packed: object = None) -> Tensor:
    """See `ops.mla_expand`. Reads the plain matrix."""
    return torch.bmm(latent.transpose(0, 1), w_uv.transpose(1, 2)).transpose(0, 1)


@register(op="mla_decode", path="ref/torch", device="any", priority=0, invariant=False, layout="mla")
def mla_decode(q_latent: Tensor, q_rope: Tensor, cache: Tensor, batch: AttentionBatch, scale: float) -> Tensor:
    """See `ops.mla_decode`."""
    out = torch.empty_like(q_latent)  # [n, h, rank]
    for row in range(batch.decodes):
        _, context = _extent(batch, row)
        entries = accumulate(_gather_mla(cache, batch, row, context, q_latent.shape[-1]))  # [c, rank + rope]
        query = accumulate(torch.cat((q_latent[row], q_rope[row]), dim=-1))  # [h, rank + rope]
        weights = torch.softmax(query @ entries.T * scale, dim=-1)  # [h, c]
        out[row] = (weights @ entries[:, : q_latent.shape[-1]]).to(out.dtype)
    return out


@register(op="mla_prefill", path="ref/torch", device="any", priority=0, invariant=False, layout="mla")
def mla_prefill(
    q_nope: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    batch: AttentionBatch,
    w_uk: Tensor,
    w_uv: Tensor,
    scale: float,
    packed: object = None,
) -> Tensor:
    """See `ops.mla_prefill`. Reads the plain matrices."""
    rank = w_uk.shape[-1]
    out = q_nope.new_empty(q_nope.shape[0], q_nope.shape[1], w_uv.shape[1])  # [t, h, v]
    for row in range(batch.decodes, batch.slots.shape[0]):
        tokens, context = _extent(batch, row)
        entries = accumulate(_gather_mla(cache, batch, row, context, rank))  # [c, rank + rope]
        latent, k_rope = entries[:, :rank], entries[:, rank:]
        keys = torch.einsum("cl,hnl->hcn", latent, accumulate(w_uk))  # the latents, projected up per head
        values = torch.einsum("cl,hvl->hcv", latent, accumulate(w_uv))
        scores = torch.einsum("thn,hcn->htc", accumulate(q_nope[tokens]), keys)
        scores = (scores + torch.einsum("thr,cr->htc", accumulate(q_rope[tokens]), k_rope)) * scale
        weights = torch.softmax(_causal(scores, context), dim=-1)
        out[tokens] = torch.einsum("htc,hcv->thv", weights, values).to(out.dtype)
    return out


@register(op="gqa_decode", path="ref/torch", device="any", priority=0, invariant=False, layout="gqa")
def gqa_decode(q: Tensor, cache: Tensor, batch: AttentionBatch, scale: float) -> Tensor:
    """See `ops.gqa_decode`."""
    out = torch.empty_like(q)
    for row in range(batch.decodes):
        _gqa_row(q[row : row + 1], cache, batch, row, scale, out[row : row + 1])
    return out


@register(op="gqa_prefill", path="ref/torch", device="any", priority=0, invariant=False, layout="gqa")
def gqa_prefill(q: Tensor, cache: Tensor, batch: AttentionBatch, scale: float) -> Tensor:
    """See `ops.gqa_prefill`."""
    out = torch.empty_like(q)
    for row in range(batch.decodes, batch.slots.shape[0]):
        tokens, _ = _extent(batch, row)
        _gqa_row(q[tokens], cache, batch, row, scale, out[tokens])
    return out


def _gqa_row(q: Tensor, cache: Tensor, batch: AttentionBatch, row: int, scale: float, out: Tensor) -> None:
    _, context = _extent(batch, row)
    keys, values = _gather_gqa(cache, batch, row, context)  # [kv_heads, c, hd] each
    grouped = accumulate(q).reshape(
        q.shape[0], keys.shape[0], q.shape[1] // keys.shape[0], q.shape[2]
    )  # [t, kv_heads, h / kv_heads, hd]
    scores = torch.einsum("tkgd,kcd->kgtc", grouped, accumulate(keys)) * scale
    weights = torch.softmax(_causal(scores, context), dim=-1)
    out.copy_(torch.einsum("kgtc,kcd->tkgd", weights, accumulate(values)).flatten(1, 2))


def _extent(batch: AttentionBatch, row: int) -> tuple[slice, int]:
    """The row's tokens, counted from the first prefill token, and its context after this step."""
    first = int(batch.offsets[row]) - batch.decodes
    length = int(batch.lengths[row])
    return slice(first, first + length), int(batch.starts[row]) + length


def _causal(scores: Tensor, context: int) -> Tensor:
    """Token i of the last t positions of the context sees the positions up to its own. scores: [..., t, c]."""
    t = scores.shape[-2]
    position = torch.arange(context - t, context, device=scores.device)
    visible = torch.arange(context, device=scores.device) <= position[:, None]
    return scores.masked_fill(~visible, float("-inf"))


def _blocks(batch: AttentionBatch, row: int, context: int, block_tokens: int) -> Tensor:
    blocks = -(-context // block_tokens)
    return batch.block_table[int(batch.slots[row]), :blocks].long()


def _gather_mla(cache: Tensor, batch: AttentionBatch, row: int, context: int, rank: int) -> Tensor:
    entries = cache[_blocks(batch, row, context, cache.shape[1])].flatten(0, 1)[:context]
    return fp8.decode(entries, rank) if cache.dtype is torch.float8_e4m3fn else entries


def _gather_gqa(cache: Tensor, batch: AttentionBatch, row: int, context: int) -> tuple[Tensor, Tensor]:
    pages = cache[_blocks(batch, row, context, cache.shape[3])]  # [blocks, 2, kv_heads, block_tokens, hd]
    both = pages.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :context]
    if cache.dtype is torch.float8_e4m3fn:
        both = fp8.decode_heads(both)
    return both[0], both[1]

"""Paged attention on the CPU: wrappers of the native kernels, and the choice of the MLA prefill algorithm."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

import tokenrelay.kernels._cpu as _native
from tokenrelay.kernels.batch import AttentionBatch
from tokenrelay.kernels.cpu.packed import native_weight
from tokenrelay.kernels.cpu.variants import FLOATS, PAIRS, Variant, check, check_axes, check_dense, code_of, part
from tokenrelay.kernels.layout import absorbed_tokens_max
from tokenrelay.kernels.packed import PackedHeads, PackedWeight
from tokenrelay.kernels.registry import Limit, register

# Tokens of a context that are projected up at once; its keys and values should stay in the last cache.
_STRETCH_TOKENS = 2048

_Batch = tuple[int, int, int, int, int, int, int]
_last_batch: tuple[AttentionBatch | None, _Batch] = (None, (0, 0, 0, 0, 0, 0, 0))


def register_variant(variant: Variant) -> None:
    """Register every operation of this file for one set of inner loops."""
    dtypes = ("bfloat16",) if variant.pairs else FLOATS
    common = {"device": "cpu", "isa": variant.isa, "dtypes": dtypes}
    for op, call, layout in (
        ("mla_decode", mla_decode, "mla"),
        ("mla_prefill", mla_prefill, "mla"),
        ("gqa_decode", gqa_decode, "gqa"),
        ("gqa_prefill", gqa_prefill, "gqa"),
    ):
        limits = {"heads": Limit(1, 1024), "block_tokens": Limit(1, 1024)}
        add = register(
            op=op,
            path=variant.path,
            layout=layout,
            priority=variant.priority,
            limits=limits,
            invariant=op != "mla_prefill",  # its algorithm follows the chunk's length
            **common,  # type: ignore[arg-type]
        )
        add(functools.partial(call, variant.code))
    for op, head_call in (("mla_absorb", mla_absorb), ("mla_expand", mla_expand)):
        register(
            op=op,
            path=variant.path,
            priority=variant.priority,
            **common,  # type: ignore[arg-type]
        )(functools.partial(head_call, variant.code))
    # One algorithm for decode and prefill, whose bits do not depend on how a prompt is cut: for deterministic serving.
    add = register(
        op="mla_prefill",
        path=f"{variant.path}/absorbed",
        layout="mla",
        priority=variant.priority - 5,
        **common,  # type: ignore[arg-type]
    )
    add(functools.partial(mla_prefill, variant.code, absorbed_tokens=1 << 62))


def native_batch(batch: AttentionBatch) -> _Batch:
    """The batch as the extension takes it. All layers of a step pass the same object: it is checked once."""
    global _last_batch
    last, found = _last_batch
    if last is batch:
        return found
    check_axes("batch.block_table", batch.block_table, 2)
    rows = batch.slots.shape[0]
    check_dense("batch.block_table", batch.block_table, torch.int32, tuple(batch.block_table.shape))
    check_dense("batch.slots", batch.slots, torch.int32, (rows,))
    check_dense("batch.starts", batch.starts, torch.int32, (rows,))
    check_dense("batch.lengths", batch.lengths, torch.int32, (rows,))
    check_dense("batch.offsets", batch.offsets, torch.int32, (rows + 1,))
    if not 0 <= batch.decodes <= rows:
        raise ValueError(f"batch.decodes is {batch.decodes}, expected 0 to {rows}")
    found = (
        batch.block_table.data_ptr(),
        batch.block_table.shape[0],
        batch.block_table.shape[1],
        batch.slots.data_ptr(),
        batch.starts.data_ptr(),
        batch.lengths.data_ptr(),
        batch.offsets.data_ptr(),
    )
    _last_batch = (batch, found)
    return found


def mla_decode(
    isa: int, q_latent: Tensor, q_rope: Tensor, cache: Tensor, batch: AttentionBatch, scale: float
) -> Tensor:
    """See `ops.mla_decode`."""
    native = native_batch(batch)
    out = torch.empty_like(q_latent, memory_format=torch.contiguous_format)
    check_axes("q_latent", q_latent, 3)
    if q_latent.shape[0] != batch.decodes:
        raise ValueError(f"q_latent has {q_latent.shape[0]} rows, the batch has {batch.decodes} decodes")
    _mla_attend(isa, q_latent, q_rope, cache, native, (0, batch.decodes, 0), out, scale)
    return out


def _mla_attend(
    isa: int,
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    native: _Batch,
    rows: tuple[int, int, int],
    out: Tensor,
    scale: float,
) -> None:
    """Attention over latents: q_latent, out [t, h, rank], q_rope [t, h, rope], any strides but the last."""
    code = code_of("cache", cache)
    tokens, heads, rank = q_latent.shape
    check_axes("cache", cache, 3)
    blocks, block_tokens, width = cache.shape
    check_dense("cache", cache, cache.dtype, (blocks, block_tokens, width))
    check("q_latent", q_latent, cache.dtype, (tokens, heads, rank))
    check("q_rope", q_rope, cache.dtype, (tokens, heads, width - rank))
    _native.mla_attention(
        isa,
        code,
        native,
        rows,
        cache.data_ptr(),
        blocks,
        block_tokens,
        tokens,
        heads,
        rank,
        width - rank,
        part(q_latent),
        part(q_rope),
        part(out),
        scale,
    )


def mla_absorb(isa: int, q_nope: Tensor, w_uk: Tensor, packed: PackedHeads | None = None) -> Tensor:
    """See `ops.mla_absorb`."""
    check_axes("q_nope", q_nope, 3)
    check_axes("w_uk", w_uk, 3)
    out = torch.empty(*q_nope.shape[:2], w_uk.shape[2], dtype=q_nope.dtype)
    return _head_product(isa, q_nope, w_uk, packed, out, absorbs=True)


def mla_expand(isa: int, latent: Tensor, w_uv: Tensor, packed: PackedHeads | None = None) -> Tensor:
    """See `ops.mla_expand`."""
    check_axes("latent", latent, 3)
    check_axes("w_uv", w_uv, 3)
    out = torch.empty(*latent.shape[:2], w_uv.shape[1], dtype=latent.dtype)
    return _head_product(isa, latent, w_uv, packed, out, absorbs=False)


def _head_product(
    isa: int, x: Tensor, weight: Tensor, packed: PackedHeads | None, out: Tensor, *, absorbs: bool
) -> Tensor:
    """x [t, h, depth] -> out [t, h, width], any strides but the last; weight [h, depth, width] or [h, width, depth]."""
    code = code_of("x", x)
    tokens, heads, depth = x.shape
    width = out.shape[2]
    check("x", x, x.dtype, (tokens, heads, depth))
    shape = (heads, depth, width) if absorbs else (heads, width, depth)
    check_dense("w_uk" if absorbs else "w_uv", weight, x.dtype, shape)
    if packed is not None and isa == PAIRS:
        matrix = packed.absorb if absorbs else packed.up
        first = matrix.columns - heads * width  # behind the keys of all heads
        _native.packed_heads(isa, (tokens, heads, depth, width), part(x), native_weight(matrix), first, part(out))
        return out
    _native.head_product(isa, code, absorbs, tokens, heads, depth, width, part(x), weight.data_ptr(), part(out))
    return out


def mla_prefill(
    isa: int,
    q_nope: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    batch: AttentionBatch,
    w_uk: Tensor,
    w_uv: Tensor,
    scale: float,
    packed: PackedHeads | None = None,
    *,
    absorbed_tokens: int | None = None,
) -> Tensor:
    """See `ops.mla_prefill`. Rows of at most `absorbed_tokens` tokens attend over latents, longer ones over keys and
    values that are projected up stretch by stretch; without it, whichever is cheaper."""
    native = native_batch(batch)
    check_axes("q_nope", q_nope, 3)
    check_axes("w_uv", w_uv, 3)
    (tokens, heads, nope), (_, value, rank) = q_nope.shape, w_uv.shape
    check("q_nope", q_nope, cache.dtype, (tokens, heads, nope))
    check_dense("w_uk", w_uk, cache.dtype, (heads, nope, rank))
    check_dense("w_uv", w_uv, cache.dtype, (heads, value, rank))
    check_axes("cache", cache, 3)
    rope = cache.shape[2] - rank
    check("q_rope", q_rope, cache.dtype, (tokens, heads, rope))
    out = q_nope.new_empty(tokens, heads, value)
    offsets, lengths, starts = batch.offsets.tolist(), batch.lengths.tolist(), batch.starts.tolist()
    rows = len(lengths)

    def absorbs(row: int) -> bool:
        most = absorbed_tokens_max(rank, nope, value, starts[row]) if absorbed_tokens is None else absorbed_tokens
        return bool(lengths[row] <= most)

    if offsets[rows] - batch.decodes != tokens:
        raise ValueError(f"q_nope has {tokens} tokens, the batch has {offsets[rows] - batch.decodes} prefill tokens")
    row = batch.decodes
    while row < rows:
        last = row
        while last < rows and absorbs(last):
            last += 1
        if last > row:  # some short rows side by side
            first = offsets[row]
            span = slice(first - batch.decodes, offsets[last] - batch.decodes)
            weights = (w_uk, w_uv, packed)
            _absorbed(isa, q_nope[span], q_rope[span], cache, native, (row, last, first), weights, scale, out[span])
            row = last
        else:
            span = slice(offsets[row] - batch.decodes, offsets[row] - batch.decodes + lengths[row])
            if packed is None or isa != PAIRS:
                _projected(isa, q_nope[span], q_rope[span], cache, batch, row, w_uk, w_uv, scale, out[span])
            else:
                _projected_natively(isa, q_nope, q_rope, cache, (native, row, batch.decodes), packed.up, scale, out)
            row += 1
    return out


def _absorbed(
    isa: int,
    q_nope: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    native: _Batch,
    rows: tuple[int, int, int],
    weights: tuple[Tensor, Tensor, PackedHeads | None],
    scale: float,
    out: Tensor,
) -> None:
    w_uk, w_uv, packed = weights
    q_latent = mla_absorb(isa, q_nope, w_uk, packed)
    latent = torch.empty_like(q_latent)
    _mla_attend(isa, q_latent, q_rope, cache, native, rows, latent, scale)
    _head_product(isa, latent, w_uv, packed, out, absorbs=False)


def _projected(
    isa: int,
    q_nope: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    batch: AttentionBatch,
    row: int,
    w_uk: Tensor,
    w_uv: Tensor,
    scale: float,
    out: Tensor,
) -> None:
    """One row: stretches of its context are projected up, and attended to as ordinary heads."""
    (tokens, heads, nope), (_, value, rank) = q_nope.shape, w_uv.shape
    block_tokens, width = cache.shape[1:]
    start = int(batch.starts[row])
    context = start + tokens
    blocks = _row_blocks(batch, row, -(-context // block_tokens), cache.shape[0])
    code = code_of("cache", cache)
    state_m, state_l = torch.empty(2, heads, tokens).unbind()
    state_o = torch.empty(heads, tokens, value)
    unit = math.lcm(_native.RUN_TOKENS, block_tokens)
    stretch = unit * max(1, _STRETCH_TOKENS // unit)
    for first in range(0, context, stretch):
        count = min(stretch, context - first)
        entries = cache.index_select(0, blocks[first // block_tokens : -(-(first + count) // block_tokens)])
        entries = entries.view(-1, width)[:count]
        keys = entries[:, :rank] @ w_uk.view(heads * nope, rank).T  # [c, h * nope]
        values = entries[:, :rank] @ w_uv.view(heads * value, rank).T  # [c, h * v]
        _native.dense_attention(
            isa,
            code,
            heads,
            tokens,
            count,
            first,
            start,
            (keys.data_ptr(), heads * nope, nope),
            (values.data_ptr(), heads * value, value),
            entries[:, rank:].data_ptr(),
            width,
            nope,
            width - rank,
            value,
            part(q_nope),
            part(q_rope),
            scale,
            state_m.data_ptr(),
            state_l.data_ptr(),
            state_o.data_ptr(),
        )
    _native.dense_finish(isa, code, heads, tokens, value, state_l.data_ptr(), state_o.data_ptr(), part(out))


def _projected_natively(
    isa: int,
    q_nope: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    place: tuple[_Batch, int, int],
    up: PackedWeight,
    scale: float,
    out: Tensor,
) -> None:
    """As `_projected`, in one call; `place`: batch, row and the token that index 0 of q and out stands for."""
    (tokens, heads, nope), value, (blocks, block_tokens, width) = q_nope.shape, out.shape[2], cache.shape
    rope = q_rope.shape[2]
    expected = (heads * (nope + value), width - rope)
    if (up.bits, up.experts, up.columns, up.width) != (16, 0, *expected):
        raise ValueError(
            f"packed.up is {up.bits} bits [{up.columns}, {up.width}], expected 16 bits [{expected[0]}, {expected[1]}]"
        )
    check_dense("cache", cache, torch.bfloat16, (blocks, block_tokens, width))
    native, row, token = place
    _native.projected_attention(
        isa,
        native,
        (row, token),
        (cache.data_ptr(), blocks, block_tokens),
        (tokens, heads, nope, rope, value),
        native_weight(up),
        part(q_nope),
        part(q_rope),
        part(out),
        scale,
    )


def _row_blocks(batch: AttentionBatch, row: int, count: int, blocks_total: int) -> Tensor:
    """The row's blocks as int64 [count]; ValueError where the table does not hold them."""
    slot = int(batch.slots[row])
    if not 0 <= slot < batch.block_table.shape[0]:
        raise ValueError(f"row {row}: slot {slot} is not in block_table")
    if count > batch.block_table.shape[1]:
        raise ValueError(f"row {row}: its context is longer than block_table is wide")
    blocks = batch.block_table[slot, :count].long()
    if count and (int(blocks.min()) < 0 or int(blocks.max()) >= blocks_total):
        raise ValueError(f"row {row}: a block is not in the cache of {blocks_total}")
    return blocks


def gqa_decode(isa: int, q: Tensor, cache: Tensor, batch: AttentionBatch, scale: float) -> Tensor:
    """See `ops.gqa_decode`."""
    if q.shape[0] != batch.decodes:
        raise ValueError(f"q has {q.shape[0]} rows, the batch has {batch.decodes} decodes")
    return _gqa(isa, q, cache, batch, (0, batch.decodes, 0), scale)


def gqa_prefill(isa: int, q: Tensor, cache: Tensor, batch: AttentionBatch, scale: float) -> Tensor:
    """See `ops.gqa_prefill`."""
    return _gqa(isa, q, cache, batch, (batch.decodes, batch.slots.shape[0], batch.decodes), scale)


def _gqa(isa: int, q: Tensor, cache: Tensor, batch: AttentionBatch, rows: tuple[int, int, int], scale: float) -> Tensor:
    native = native_batch(batch)
    check_axes("q", q, 3)
    check_axes("cache", cache, 5)
    code = code_of("cache", cache)
    tokens, heads, head_dim = q.shape
    blocks, _, kv_heads, block_tokens, _ = cache.shape
    check_dense("cache", cache, cache.dtype, (blocks, 2, kv_heads, block_tokens, head_dim))
    check("q", q, cache.dtype, (tokens, heads, head_dim))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    _native.gqa_attention(
        isa,
        code,
        native,
        rows,
        cache.data_ptr(),
        blocks,
        kv_heads,
        block_tokens,
        tokens,
        heads,
        head_dim,
        part(q),
        part(out),
        scale,
    )
    return out

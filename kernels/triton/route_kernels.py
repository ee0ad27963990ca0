"""Routing in one launch, and the sorting of choices by expert in another: torch's operations take a dozen for each."""

from __future__ import annotations

import triton.language as tl

from tokenrelay.kernels.triton.language import jit


@jit
def route(
    logits: tl.tensor,
    bias: tl.tensor,
    experts: tl.tensor,
    weights: tl.tensor,
    row_stride: tl.tensor,
    scale: tl.tensor,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS_P: tl.constexpr,
    SIZE_P: tl.constexpr,
    GROUPS_TOP_K: tl.constexpr,
    TOP_K: tl.constexpr,
    BIAS: tl.constexpr,
    SIGMOID: tl.constexpr,
    TOP2: tl.constexpr,
    NORMALIZE: tl.constexpr,
) -> None:
    """Grid (tokens). logits f32 [t, GROUPS SIZE] -> experts int32 and weights f32 [t, TOP_K], best first."""
    token = tl.program_id(0).to(tl.int64)
    group, within = tl.arange(0, GROUPS_P), tl.arange(0, SIZE_P)
    expert = group[:, None] * SIZE + within[None, :]
    inside = (group < GROUPS)[:, None] & (within < SIZE)[None, :]
    x = tl.load(logits + token * row_stride + expert, mask=inside, other=float("-inf"))
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-x))
    else:
        power = tl.exp(x - tl.max(tl.max(x, 1), 0))
        scores = tl.div_rn(power, tl.zeros_like(power) + tl.sum(tl.sum(power, 1), 0))
    ranked = scores
    if BIAS:
        ranked += tl.load(bias + expert, mask=inside, other=0.0)
    ranked = tl.where(inside, ranked, float("-inf"))
    if GROUPS > 1:
        best = tl.max(ranked, 1)
        if TOP2:
            first = tl.min(tl.where(ranked == best[:, None], within[None, :], SIZE_P), 1)
            best += tl.max(tl.where(within[None, :] == first[:, None], float("-inf"), ranked), 1)
        best = tl.where(group < GROUPS, best, float("-inf"))
        is_open = group < 0
        for _ in tl.static_range(GROUPS_TOP_K):
            chosen = tl.min(tl.where(best == tl.max(best, 0), group, GROUPS_P), 0)
            is_open = is_open | (group == chosen)
            best = tl.where(group == chosen, float("-inf"), best)
        ranked = tl.where(is_open[:, None], ranked, float("-inf"))
    total = tl.zeros((), tl.float32)
    for i in tl.static_range(TOP_K):
        top = tl.max(tl.max(ranked, 1), 0)
        chosen = tl.min(tl.min(tl.where(ranked == top, expert, GROUPS * SIZE), 1), 0)
        score = tl.sum(tl.sum(tl.where(expert == chosen, scores, 0.0), 1), 0)
        ranked = tl.where(expert == chosen, float("-inf"), ranked)
        tl.store(experts + token * TOP_K + i, chosen)
        tl.store(weights + token * TOP_K + i, score * scale)
        total += score
    if NORMALIZE:
        tl.debug_barrier()  # each weight is read where it was written by another thread
        k = tl.arange(0, 64)
        at = weights + token * TOP_K + k
        w = tl.load(at, mask=k < TOP_K, other=0.0)
        tl.debug_barrier()
        tl.store(at, tl.div_rn(w, tl.zeros_like(w) + (total + 1e-20)), mask=k < TOP_K)


@jit
def group(
    experts: tl.tensor,
    order: tl.tensor,
    offsets: tl.tensor,
    tile_expert: tl.tensor,
    tile_first: tl.tensor,
    choices: tl.tensor,
    tiles: tl.tensor,
    EXPERTS: tl.constexpr,
    EXPERTS_P: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> None:
    """Grid (1). The choices sorted by expert, stably; where each expert's begin; the tiles of BLOCK_M rows."""
    e, i = tl.arange(0, EXPERTS_P), tl.arange(0, BLOCK)
    counts = tl.zeros((EXPERTS_P,), tl.int32)
    for first in range(0, choices, BLOCK):
        chosen = tl.load(experts + first + i, mask=first + i < choices, other=-2)
        none = (chosen == -1) | (chosen < -2) | (chosen >= EXPERTS)
        chosen = tl.where(none, EXPERTS, chosen)
        counts += tl.sum((chosen[None, :] == e[:, None]).to(tl.int32), 1)
    begins = tl.cumsum(counts, 0) - counts
    tl.store(offsets + e, begins, mask=e <= EXPERTS)
    for first in range(0, tiles, BLOCK):
        tl.store(tile_expert + first + i, tl.full((BLOCK,), EXPERTS, tl.int32), mask=first + i < tiles)
        tl.store(tile_first + first + i, tl.zeros((BLOCK,), tl.int32), mask=first + i < tiles)
    tl.debug_barrier()
    each = tl.where(e < EXPERTS, (counts + (BLOCK_M - 1)) // BLOCK_M, 0)
    tile = tl.cumsum(each, 0) - each
    for n in range(0, tl.max(each, 0)):
        tl.store(tile_expert + tile + n, e, mask=n < each)
        tl.store(tile_first + tile + n, begins + n * BLOCK_M, mask=n < each)
    for first in range(0, choices, BLOCK):
        mine = tl.load(experts + first + i, mask=first + i < choices, other=-2)
        mine = tl.where((mine == -1) | (mine < -2) | (mine >= EXPERTS), EXPERTS, mine)
        rank = tl.zeros((BLOCK,), tl.int32)
        for before in range(0, first + BLOCK, BLOCK):
            other = tl.load(experts + before + i, mask=before + i < choices, other=-2)
            other = tl.where((other == -1) | (other < -2) | (other >= EXPERTS), EXPERTS, other)
            earlier = (before + i)[None, :] < (first + i)[:, None]
            rank += tl.sum(((other[None, :] == mine[:, None]) & earlier).to(tl.int32), 1)
        real = first + i < choices
        place = tl.load(offsets + mine, mask=real, other=0) + rank
        tl.store(order + place, first + i, mask=real)

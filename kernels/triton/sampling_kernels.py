"""Choosing tokens with the bits of `ref/sampling.py`: whole-number weights, Philox, no sum whose order matters.

All kernels here are launched without contraction of a * b + c, which would change the exponentials' last bits.

    largest    grid (rows, chunks)   the largest logit of each chunk and its lowest token
    weigh      grid (rows, chunks)   each token's weight, and the chunk's sum; nothing for greedy rows
    choose     grid (rows)           top_k, top_p and the draw

Weights stand in the order of token ids; top_k and top_p only need to know from which logit on a token is kept, and how
many of those that equal it. Both are found by comparing with seven thresholds a pass, so eleven passes find one among
2^32 logits.
"""

from __future__ import annotations

import triton.language as tl

from tokenrelay.kernels.triton.language import jit

LOWEST = tl.constexpr(-3.4028234663852886e38)
WEIGHT_ONE = tl.constexpr(float(1 << 42))
LOG2_E = tl.constexpr(1.44269504088896338700)
LN2_HIGH = tl.constexpr(0.693147180369123816490)
LN2_LOW = tl.constexpr(1.90821492927058770002e-10)
NEAREST = tl.constexpr(6755399441055744.0)  # 1.5 * 2^52: adding and subtracting it rounds to a whole number
WAYS = tl.constexpr(8)
# 1 / n! from n = 11 down to 0.
C11 = tl.constexpr(1 / 39916800)
C10 = tl.constexpr(1 / 3628800)
C9 = tl.constexpr(1 / 362880)
C8 = tl.constexpr(1 / 40320)
C7 = tl.constexpr(1 / 5040)
C6 = tl.constexpr(1 / 720)
C5 = tl.constexpr(1 / 120)
C4 = tl.constexpr(1 / 24)
C3 = tl.constexpr(1 / 6)


@jit
def clean(x: tl.tensor) -> tl.tensor:
    """A NaN is -inf, +inf the largest number, -0 is 0."""
    x = tl.where(x != x, float("-inf"), x)
    x = tl.where(x == 0.0, 0.0, x)
    return tl.where(x > -LOWEST, -LOWEST, x)


@jit
def order(x: tl.tensor) -> tl.tensor:
    """int64 keys that compare as clean float32 do."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@jit
def largest(
    logits: tl.tensor,
    tops: tl.tensor,
    ids: tl.tensor,
    vocab: tl.tensor,
    row_stride: tl.tensor,
    chunks: tl.tensor,
    CHUNK: tl.constexpr,
) -> None:
    """tops f32 and ids int32 [rows, chunks]."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    x = clean(tl.load(logits + row * row_stride + at, mask=at < vocab, other=float("-inf")))
    top = tl.max(x, 0)
    tl.store(tops + row * chunks + chunk, top)
    tl.store(ids + row * chunks + chunk, tl.min(tl.where((x == top) & (at < vocab), at, 2147483647), 0))


@jit
def weight_of(x: tl.tensor, top: tl.tensor, inverse: tl.tensor) -> tl.tensor:
    """floor(2^42 exp((x - top) inverse)) in float64, as the reference spells it."""
    scaled = (x.to(tl.float64) - top.to(tl.float64)) * inverse
    scaled = tl.where(scaled < -100.0, -100.0, scaled)
    n = (scaled * LOG2_E + NEAREST) - NEAREST
    r = (scaled - n * LN2_HIGH) - n * LN2_LOW
    series = r * C11 + C10
    series = series * r + C9
    series = series * r + C8
    series = series * r + C7
    series = series * r + C6
    series = series * r + C5
    series = series * r + C4
    series = series * r + C3
    series = series * r + 0.5
    series = series * r + 1.0
    series = series * r + 1.0
    power = ((n.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    return (series * power * WEIGHT_ONE).to(tl.int64)


@jit
def weigh(
    logits: tl.tensor,
    temperatures: tl.tensor,
    inverses: tl.tensor,
    floors: tl.tensor,
    tops: tl.tensor,
    weights: tl.tensor,
    totals: tl.tensor,
    vocab: tl.tensor,
    row_stride: tl.tensor,
    chunks: tl.tensor,
    CHUNK: tl.constexpr,
    CHUNKS_P: tl.constexpr,
) -> None:
    """weights int64 [rows, vocab], totals int64 [rows, chunks]; floors int64 [rows]: a smaller weight is none."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(temperatures + row) > 0.0:
        c = tl.arange(0, CHUNKS_P)
        top = tl.max(tl.load(tops + row * chunks + c, mask=c < chunks, other=float("-inf")), 0)
        if top >= LOWEST:
            at = chunk * CHUNK + tl.arange(0, CHUNK)
            x = clean(tl.load(logits + row * row_stride + at, mask=at < vocab, other=float("-inf")))
            w = weight_of(x, top, tl.load(inverses + row))
            w = tl.where((w >= tl.load(floors + row)) & (at < vocab), w, 0)
            tl.store(weights + row * vocab + at, w, mask=at < vocab)
            tl.store(totals + row * chunks + chunk, tl.sum(w, 0))


@jit
def philox(seed: tl.tensor, choice: tl.tensor, position: tl.tensor) -> tl.tensor:
    """One uint64: Philox-4x32-10 (Salmon et al. 2011), key `seed`, counter (position, choice, 0)."""
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0, c1 = position.to(tl.uint32), (position >> 32).to(tl.uint32)
    c2, c3 = choice.to(tl.uint32), (choice * 0).to(tl.uint32)
    for _ in tl.static_range(10):
        a, b = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        n0 = (b >> 32).to(tl.uint32) ^ c1 ^ k0
        n2 = (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c0, c1, c2, c3 = n0, b.to(tl.uint32), n2, a.to(tl.uint32)
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    return c0.to(tl.uint64) | (c1.to(tl.uint64) << 32)


@jit
def cut(
    logits: tl.tensor,
    weights: tl.tensor,
    vocab: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    wanted: tl.tensor,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
) -> tl.tensor:
    """The largest key from which on tokens are worth `wanted` together, and what those above it are worth.

    A token is worth 1 (COUNT) or its weight. Those from `low` on are worth enough, those from `high` on are not.
    """
    way = tl.arange(0, WAYS).to(tl.int64)
    above = tl.zeros((), tl.int64)
    while high - low > 1:
        bound = low + ((high - low) * way) // WAYS
        worth = tl.zeros((WAYS, BLOCK), tl.int64)
        for first in range(0, vocab, BLOCK):
            at = first + tl.arange(0, BLOCK)
            key = order(clean(tl.load(logits + at, mask=at < vocab, other=float("-inf"))))
            if COUNT:
                value = (at < vocab).to(tl.int64)
            else:
                value = tl.load(weights + at, mask=at < vocab, other=0)
            worth += tl.where(key[None, :] >= bound[:, None], value[None, :], 0)
        found = tl.sum(worth, 1)
        enough = (found >= wanted) | (way == 0)
        low_next = tl.max(tl.where(enough, bound, low), 0)
        over = tl.min(tl.where(enough, high, bound), 0)
        above = tl.where(over < high, tl.max(tl.where(enough, 0, found), 0), above)
        low, high = low_next, over
    return low, above


@jit
def choose(
    logits: tl.tensor,
    temperatures: tl.tensor,
    top_ps: tl.tensor,
    top_ks: tl.tensor,
    seeds: tl.tensor,
    choices: tl.tensor,
    positions: tl.tensor,
    tops: tl.tensor,
    ids: tl.tensor,
    weights: tl.tensor,
    totals: tl.tensor,
    out: tl.tensor,
    vocab: tl.tensor,
    row_stride: tl.tensor,
    chunks: tl.tensor,
    CHUNK: tl.constexpr,
    CHUNKS_P: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """out int64 [rows]."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, CHUNKS_P)
    chunk_tops = tl.load(tops + row * chunks + c, mask=c < chunks, other=float("-inf"))
    top = tl.max(chunk_tops, 0)
    best = tl.load(ids + row * chunks + c, mask=c < chunks, other=2147483647)
    token = tl.min(tl.where(chunk_tops == top, best, 2147483647), 0).to(tl.int64)
    possible = top >= LOWEST
    token = tl.where(possible, token, 0)
    if possible & (tl.load(temperatures + row) > 0.0):
        sums = tl.load(totals + row * chunks + c, mask=c < chunks, other=0)
        total = tl.sum(sums, 0)
        x, w = logits + row * row_stride, weights + row * vocab
        top_k, top_p = tl.load(top_ks + row).to(tl.int64), tl.load(top_ps + row)
        highest = order(top)
        key, ties = tl.full((), -(1 << 32), tl.int64), vocab.to(tl.int64)  # kept: above key, and so many that equal it
        if (top_k > 0) & (top_k < vocab):
            key, more = cut(x, w, vocab, key, highest + 1, top_k, BLOCK, True)
            ties = top_k - more
            total = kept_total(x, w, vocab, key, ties, BLOCK)
        if top_p < 1.0:
            bound = (tl.where(top_p > 0.0, top_p, 0.0).to(tl.float64) * total.to(tl.float64)).to(tl.int64)
            if bound > 0:
                before = key
                key, heavier = cut(x, w, vocab, key, highest + 1, bound, BLOCK, False)
                each = weight_at(x, w, vocab, key, BLOCK)
                few = (bound - heavier + each - 1) // tl.maximum(each, 1)
                ties = tl.where(key == before, tl.minimum(few, ties), few)
            else:
                key, ties = highest, tl.full((), 1, tl.int64)
            total = kept_total(x, w, vocab, key, ties, BLOCK)
        random = philox(tl.load(seeds + row), tl.load(choices + row), tl.load(positions + row))
        target = tl.umulhi(random, total.to(tl.uint64)).to(tl.int64)
        token = draw(x, w, vocab, key, ties, target, sums, chunks, CHUNK, CHUNKS_P, BLOCK)
    tl.store(out + row, token)


@jit
def weight_at(
    logits: tl.tensor, weights: tl.tensor, vocab: tl.tensor, key: tl.tensor, BLOCK: tl.constexpr
) -> tl.tensor:
    """The weight of the tokens whose logit is `key`: one for all."""
    found = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, vocab, BLOCK):
        at = first + tl.arange(0, BLOCK)
        here = order(clean(tl.load(logits + at, mask=at < vocab, other=float("-inf")))) == key
        found = tl.maximum(found, tl.load(weights + at, mask=here & (at < vocab), other=0))
    return tl.max(found, 0)


@jit
def kept(
    logits: tl.tensor,
    weights: tl.tensor,
    vocab: tl.tensor,
    first: tl.tensor,
    key: tl.tensor,
    ties: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The weights [BLOCK] of kept tokens from `first` on, and how many more ties may be kept after them."""
    at = first + tl.arange(0, BLOCK)
    order_of = order(clean(tl.load(logits + at, mask=at < vocab, other=float("-inf"))))
    equal = ((order_of == key) & (at < vocab)).to(tl.int64)
    rank = tl.cumsum(equal, 0) - equal
    keep = (order_of > key) | ((equal > 0) & (rank < ties))
    return tl.load(weights + at, mask=keep & (at < vocab), other=0), ties - tl.sum(equal, 0)


@jit
def kept_total(
    logits: tl.tensor, weights: tl.tensor, vocab: tl.tensor, key: tl.tensor, ties: tl.tensor, BLOCK: tl.constexpr
) -> tl.tensor:
    """The weight of all kept tokens."""
    total = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, vocab, BLOCK):
        w, ties = kept(logits, weights, vocab, first, key, ties, BLOCK)
        total += w
    return tl.sum(total, 0)


@jit
def draw(
    logits: tl.tensor,
    weights: tl.tensor,
    vocab: tl.tensor,
    key: tl.tensor,
    ties: tl.tensor,
    target: tl.tensor,
    sums: tl.tensor,
    chunks: tl.tensor,
    CHUNK: tl.constexpr,
    CHUNKS_P: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The first token, by id, at which the weights of kept tokens exceed `target`."""
    first = tl.zeros((), tl.int32)
    if key < -(1 << 31):  # all are kept: the chunks' sums say where to look
        ends = tl.cumsum(sums, 0)
        chunk = tl.sum((ends <= target).to(tl.int32), 0)
        target -= tl.max(tl.where(tl.arange(0, CHUNKS_P) < chunk, ends, 0), 0)
        first = chunk * CHUNK
    found = tl.full((), -1, tl.int32)
    while (found < 0) & (first < vocab):
        w, ties = kept(logits, weights, vocab, first, key, ties, BLOCK)
        ends = tl.cumsum(w, 0)
        here = tl.sum((ends <= target).to(tl.int32), 0)
        if here < BLOCK:
            found = first + here
        target -= tl.sum(w, 0)
        first += BLOCK
    return found.to(tl.int64)


@jit
def penalize(
    logits: tl.tensor,
    rows: tl.tensor,
    presences: tl.tensor,
    frequencies: tl.tensor,
    repetitions: tl.tensor,
    offsets: tl.tensor,
    token_ids: tl.tensor,
    counts: tl.tensor,
    bias_offsets: tl.tensor,
    bias_ids: tl.tensor,
    biases: tl.tensor,
    vocab: tl.tensor,
    row_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Grid (penalized rows), in place."""
    p = tl.program_id(0)
    x = logits + tl.load(rows + p) * row_stride
    presence, frequency = tl.load(presences + p), tl.load(frequencies + p)
    repetition = tl.load(repetitions + p)
    end = tl.load(offsets + p + 1)
    for first in range(tl.load(offsets + p), end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        token = tl.load(token_ids + at, mask=at < end, other=-1)
        known = (token >= 0) & (token < vocab)
        count = tl.load(counts + at, mask=at < end, other=0)
        value = tl.load(x + token, mask=known, other=0.0)
        value = tl.where(value > 0.0, tl.div_rn(value, repetition), value * repetition)
        value = value - frequency * count.to(tl.float32) - tl.where(count > 0, presence, 0.0)
        tl.store(x + token, value, mask=known)
    tl.debug_barrier()  # a bias may be on a token that was penalized
    end = tl.load(bias_offsets + p + 1)
    for first in range(tl.load(bias_offsets + p), end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        token = tl.load(bias_ids + at, mask=at < end, other=-1)
        known = (token >= 0) & (token < vocab)
        value = tl.load(x + token, mask=known, other=0.0) + tl.load(biases + at, mask=at < end, other=0.0)
        tl.store(x + token, value, mask=known)

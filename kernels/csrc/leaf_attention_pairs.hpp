// Attention with bfloat16 pairs (AVX-512 BF16): scores and weighted sums are products with packed keys and values, as
// packed.hpp has them with weights. Part of isa_avx512bf16.cpp.
//
//   keys:   [groups of 16 tokens][depth / 2][16][2]
//   values: [groups of 16 columns][tokens / 2][16][2]
//
// What is missing at the ends is zero. A lane is a token's score or a column of the result, and walks depth or tokens
// in order, so no sum crosses lanes and a row's bits are the same whatever stands beside it. The softmax takes a run
// at once: nothing is rescaled inside it.
#pragma once

#include "leaf_math.hpp"

#ifdef TOKENRELAY_PAIRS
namespace tokenrelay::TOKENRELAY_ISA {
namespace {

constexpr int64_t kPairGroup = 16;  // tokens or columns side by side
constexpr int64_t kPairRows = 8;    // rows of one product
constexpr int64_t kPairDepthMax = 1024;
constexpr int64_t kTileGroups = kTileTokens / kPairGroup;

inline int64_t round_up(int64_t n, int64_t unit) { return ceil_div(n, unit) * unit; }

// What of a shape is kept at once. Of a run of latents packed keys and values would not stay in the second cache: they
// are packed tile by tile, for all rows.
struct PairPlan {
  int64_t shared;  // rows that best share what is packed: it costs 2 % (latents: 5 %) of their time then
  int64_t held;    // rows whose scores are kept
  int64_t few;     // up to so many rows of a head go tile by tile; more share a whole run
  int64_t packed;  // tokens
};

constexpr PairPlan plan_of(int64_t depth, int64_t dv) {
  if (depth > 256 || dv > 256) return {64, 64, 64, kTileTokens};
  return {256, 16, kPairRows, kRunTokens};
}

// The parts of an AttendJob's scratch.
struct PairScratch {
  float *scores, *sums;  // [held, kRunTokens], [held, columns]
  bf16 *weights, *queries;
  bf16 *keys, *values;  // of a run, or of a tile where few rows read them

  static int64_t columns(int64_t dv) { return round_up(dv, kPairGroup); }
  static int64_t steps(int64_t depth) { return ceil_div(depth, 2); }

  static int64_t bytes(int64_t depth, int64_t dv) {
    const int64_t wide = round_up(steps(depth) * 2, 32);
    const PairPlan plan = plan_of(depth, dv);
    return plan.held * (kRunTokens * 6 + columns(dv) * 4) + kPairRows * wide * 2 +
           plan.packed * (wide + columns(dv)) * 2;
  }

  explicit PairScratch(const AttendJob& job) {
    const int64_t wide = round_up(steps(job.dk + job.dk2) * 2, 32);
    const PairPlan plan = plan_of(job.dk + job.dk2, job.dv);
    scores = job.scores;
    sums = scores + plan.held * kRunTokens;
    weights = reinterpret_cast<bf16*>(sums + plan.held * columns(job.dv));
    queries = weights + plan.held * kRunTokens;
    keys = queries + kPairRows * wide;
    values = keys + plan.packed * wide;
  }
};

// A run's keys and then its values, asked for some at a time, a tile before they are read, so that memory is never
// idle: blocks lie anywhere, which the hardware does not guess. Half (with many rows a quarter) are asked for while a
// tile is packed, the rest by its product: all at once they hold up what is computed. Not a function of its own: one
// that only prefetches is pure to GCC, and its calls are dropped.
class Ahead {
 public:
  explicit Ahead(const AttendJob& job) : job_(job), passed_(min_of(job.tokens, kTileTokens)), token_(passed_) { aim(); }

  // Reading comes to a tile of a head: nothing beyond the next tile is asked for yet.
  void allow(bool values, int64_t tile, int64_t head) {
    fetch(kRunTokens);  // what is left of this tile
    const int64_t count = min_of(kTileTokens, job_.tokens - tile);
    limit_ = (values ? job_.tokens + tile : tile) * job_.heads + head * count + 2 * kTileTokens;
    limit_ = min_of(limit_, 2 * job_.tokens * job_.heads);
  }

  // Of keys or values of as many tokens.
  [[gnu::always_inline]] void fetch(int64_t count) {
    for (int64_t i = 0; i < count && passed_ < limit_; ++i) {
      for (int64_t b = 0; b < bytes_; b += 64) __builtin_prefetch(at_ + b, 0, 2);
      ++passed_;
      ++token_;
      aim();
    }
  }

  // Of a tile's tokens so many are asked for while it is packed.
  int64_t packing() const { return job_.rows <= kPairRows ? kTileTokens / 2 : kTileTokens / 4; }
  // And the others by its product, which is so many steps long: one every so many.
  int64_t every(int64_t steps) const { return max_of(1, steps / (kTileTokens - packing())); }

 private:
  // The order of reading: all heads of a tile, tile by tile.
  void aim() {
    if (token_ == min_of(job_.tokens, tile_ + kTileTokens)) {
      if (++head_ == job_.heads) {
        head_ = 0;
        tile_ += kTileTokens;
      }
      if (tile_ >= job_.tokens) {
        tile_ = 0;
        values_ = true;
      }
      token_ = tile_;
    }
    at_ = static_cast<const char*>(values_ ? job_.v[token_] : job_.k[token_]) + head_ * job_.head_bytes;
    bytes_ = (values_ ? job_.dv : job_.dk) * 2;
  }

  const AttendJob& job_;
  int64_t passed_, limit_ = 0;  // keys and values of a token and head
  int64_t tile_ = 0, head_ = 0, token_;
  bool values_ = false;
  const char* at_ = nullptr;
  int64_t bytes_ = 0;
};

inline void transpose(__m512i (&row)[16]) {
  __m512i half[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    half[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
    half[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // row[i + j]: in lane l, column 4 l + j of rows i .. i + 3
    row[i] = _mm512_unpacklo_epi64(half[i], half[i + 2]);
    row[i + 1] = _mm512_unpackhi_epi64(half[i], half[i + 2]);
    row[i + 2] = _mm512_unpacklo_epi64(half[i + 1], half[i + 3]);
    row[i + 3] = _mm512_unpackhi_epi64(half[i + 1], half[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i a = _mm512_shuffle_i32x4(row[j], row[4 + j], 0x44);
    const __m512i b = _mm512_shuffle_i32x4(row[j], row[4 + j], 0xee);
    const __m512i c = _mm512_shuffle_i32x4(row[8 + j], row[12 + j], 0x44);
    const __m512i d = _mm512_shuffle_i32x4(row[8 + j], row[12 + j], 0xee);
    half[j] = _mm512_shuffle_i32x4(a, c, 0x88);
    half[4 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
    half[8 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
    half[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) row[i] = half[i];
}

// 32 elements of up to 16 tokens' keys, `offset` bytes behind their addresses; of the last ones fewer where kPart.
template <bool kPart>
[[gnu::noinline]] void pack_square(const void* const* k, int64_t offset, int64_t count, int64_t n, bf16* out) {
  const __mmask32 present = static_cast<__mmask32>((uint64_t{1} << n) - 1);
  __m512i row[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    if constexpr (kPart) {
      row[i] = _mm512_setzero_si512();
      if (i < count) row[i] = _mm512_maskz_loadu_epi16(present, static_cast<const char*>(k[i]) + offset);
    } else {
      row[i] = _mm512_loadu_si512(static_cast<const char*>(k[i]) + offset);
    }
  }
  transpose(row);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    if (!kPart || 2 * i < n) _mm512_storeu_si512(out + i * 32, row[i]);
  }
}

// `depth` elements of up to 16 tokens' keys, behind one another in `out`.
inline void pack_group(const void* const* k, int64_t offset, int64_t count, int64_t depth, bf16* out, Ahead& ahead) {
  for (int64_t d = 0; d < depth; d += 32) {
    const int64_t n = min_of(32, depth - d), due = d * (ahead.packing() / kTileGroups) / depth;
    ahead.fetch(min_of(d + 32, depth) * (ahead.packing() / kTileGroups) / depth - due);
    if (count >= kPairGroup && n == 32) {
      pack_square<false>(k, offset + d * 2, count, n, out + d * kPairGroup);
    } else {
      pack_square<true>(k, offset + d * 2, count, n, out + d * kPairGroup);
    }
  }
}

// A head's keys of a tile from token `t` on, zero where the run has ended.
inline void pack_keys(const AttendJob& job, int64_t head, int64_t t, bf16* out, Ahead& ahead) {
  ahead.allow(false, t, head);
  const int64_t steps = PairScratch::steps(job.dk + job.dk2);
  for (int64_t g = 0; g < kTileGroups; ++g, t += kPairGroup, out += steps * 2 * kPairGroup) {
    const int64_t count = max_of(0, min_of(kPairGroup, job.tokens - t));
    pack_group(job.k + t, head * job.head_bytes, count, job.dk, out, ahead);
    if (job.dk2 > 0) pack_group(job.k2 + t, 0, count, job.dk2, out + job.dk * kPairGroup, ahead);
  }
}

// Two tokens' values side by side, `stride` elements from one group of columns to the next; odd: null where the run
// ends.
template <bool kPart>
inline void pack_pair(const bf16* even, const bf16* odd, int64_t dv, bf16* out, int64_t stride) {
  alignas(64) static constexpr uint16_t kOrder[64] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                      8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47,
                                                      16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                                      24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
  const __m512i first = _mm512_load_si512(kOrder), second = _mm512_load_si512(kOrder + 32);
  for (int64_t c = 0; c < dv; c += 32, out += 2 * stride) {
    __m512i a, b;
    if constexpr (kPart) {
      const __mmask32 present = static_cast<__mmask32>((uint64_t{1} << min_of(32, dv - c)) - 1);
      a = _mm512_maskz_loadu_epi16(present, even + c);
      b = odd == nullptr ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16(present, odd + c);
    } else {
      a = _mm512_loadu_si512(even + c);
      b = _mm512_loadu_si512(odd + c);
    }
    _mm512_storeu_si512(out, _mm512_permutex2var_epi16(a, first, b));
    if (!kPart || dv - c > kPairGroup) _mm512_storeu_si512(out + stride, _mm512_permutex2var_epi16(a, second, b));
  }
}

// A head's values of a tile from token `t` on; groups of columns lie `stride` elements apart.
inline void pack_values(const AttendJob& job, int64_t head, int64_t t, bf16* out, int64_t stride, Ahead& ahead) {
  ahead.allow(true, t, head);
  const auto value = [&](int64_t i) {
    return reinterpret_cast<const bf16*>(static_cast<const char*>(job.v[i]) + head * job.head_bytes);
  };
  const int64_t end = min_of(job.tokens, t + kTileTokens);
  for (; t < end; t += 2, out += 2 * kPairGroup) {
    if (t % (kTileTokens / ahead.packing()) == 0) ahead.fetch(1);
    if (t + 1 < end && job.dv % 32 == 0) {
      pack_pair<false>(value(t), value(t + 1), job.dv, out, stride);
    } else {
      pack_pair<true>(value(t), t + 1 < end ? value(t + 1) : nullptr, job.dv, out, stride);
    }
  }
}

// A product: out[r, 16 g ..] = (or, with kAdd, +=) the sum over steps of a[r]'s pair times b[g]'s sixteen.
struct PairProduct {
  const bf16* a;
  int64_t a_stride;
  const bf16* b;
  int64_t b_stride, groups, steps;
  float* out;
  int64_t out_stride;
  Ahead* ahead;   // null: all is at hand
  int64_t every;  // steps from one call of it to the next
};

template <int MR, int NR, bool kAdd, bool kFetch>
inline void pair_block(const PairProduct& job, int64_t group) {
  __m512 acc[MR][NR];
  const char *a[MR], *b[NR];
  float* out = job.out + group * kPairGroup;
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
    a[r] = reinterpret_cast<const char*>(job.a + r * job.a_stride);
#pragma GCC unroll 4
    for (int c = 0; c < NR; ++c) {
      acc[r][c] = kAdd ? _mm512_loadu_ps(out + r * job.out_stride + c * kPairGroup) : _mm512_setzero_ps();
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < NR; ++c) b[c] = reinterpret_cast<const char*>(job.b + (group + c) * job.b_stride);
  int64_t next = 0;
  for (int64_t k = 0; k < job.steps; ++k) {
    if (kFetch && k == next) {
      job.ahead->fetch(1);
      next += job.every;
    }
    __m512bh column[NR];
#pragma GCC unroll 4
    for (int c = 0; c < NR; ++c) column[c] = (__m512bh)_mm512_loadu_si512(b[c] + k * 64);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      int32_t both;
      __builtin_memcpy(&both, a[r] + k * 4, sizeof both);
      const __m512bh pair = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 4
      for (int c = 0; c < NR; ++c) acc[r][c] = _mm512_dpbf16_ps(acc[r][c], column[c], pair);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < NR; ++c) _mm512_storeu_ps(out + r * job.out_stride + c * kPairGroup, acc[r][c]);
  }
}

template <int MR, bool kAdd, bool kFetch>
void pair_rows(const PairProduct& job) {
  constexpr int NR = MR <= 4 ? 4 : 2;
  int64_t group = 0;
  for (; group + NR <= job.groups; group += NR) pair_block<MR, NR, kAdd, kFetch>(job, group);
  for (; group < job.groups; ++group) pair_block<MR, 1, kAdd, kFetch>(job, group);
}

template <bool kAdd, int MR = kPairRows>
void pair_product(int64_t rows, const PairProduct& job) {
  if constexpr (MR > 1) {
    if (rows < MR) return pair_product<kAdd, MR - 1>(rows, job);
  }
  if (job.ahead != nullptr) return pair_rows<MR, kAdd, true>(job);
  pair_rows<MR, kAdd, false>(job);
}

// e^x for x up to about 0, to 2e-7: powers of two, and a polynomial of degree 5 (least largest error) on
// [-1/2, 1/2]. What is below e^-138 becomes 0; a NaN stays one.
inline F exp_weight(F x) {
  x = max(set1(-200.0f), x * set1(1.44269504f));  // the order of arguments lets a NaN through
  const F n = round(x);
  const F r = x - n;
  F p = set1(1.326472604e-3f);
  p = fma(p, r, set1(9.671512722e-3f));
  p = fma(p, r, set1(5.550733747e-2f));
  p = fma(p, r, set1(2.402224208e-1f));
  p = fma(p, r, set1(6.931469776e-1f));
  p = fma(p, r, set1(1.0f));
  return _mm512_scalef_ps(p, n);
}

inline __mmask16 lanes_before(int64_t n) { return n >= W ? __mmask16(0xffff) : n <= 0 ? __mmask16(0) : first_lanes(n); }

// Scores [0, visible) of a row become weights e^(score - maximum), rounded to bfloat16, and 0 up to `end`, a multiple
// of 32.
inline void soften_run(const float* s, bf16* weights, int64_t visible, int64_t end, float scale, float& m, float& l) {
  m = -__builtin_inff();
  l = 0;
  F top = set1(m), total = zero();
  for (int64_t t = 0; t < visible; t += W) {
    top = _mm512_mask_max_ps(top, lanes_before(visible - t), top, load(s + t) * set1(scale));
  }
  if (visible > 0) m = largest(top);
  const F least = set1(-m);
  const auto weight = [&](int64_t t) {
    return _mm512_maskz_mov_ps(lanes_before(visible - t), exp_weight(fma(load(s + t), set1(scale), least)));
  };
  for (int64_t t = 0; t < end; t += 2 * W) {
    const F low = weight(t), high = weight(t + W);
    total = (total + low) + high;
    _mm512_storeu_si512(weights + t, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
  if (visible > 0) l = sum(total);
}

// The tokens of the run that any of the rows [r, r + rows) sees.
inline int64_t seen(const AttendJob& job, int64_t r, int64_t rows) {
  int64_t most = 0;
  for (int64_t i = r; i < r + rows; ++i) most = max_of(most, job.visible[i] - job.first);
  return min_of(job.tokens, most);
}

// Up to kPairRows rows of a head, from `row` on; their scores are kept as the scratch's rows from `held` on.
class PairRows {
 public:
  PairRows(const AttendJob& job, const PairScratch& scratch, int64_t head, int64_t row, int64_t held)
      : job_(job),
        scratch_(scratch),
        row_(row),
        first_(head * job.rows + row),
        rows_(min_of(kPairRows, job.rows - row)),
        scores_(scratch.scores + held * kRunTokens),
        sums_(scratch.sums + held * PairScratch::columns(job.dv)),
        weights_(scratch.weights + held * kRunTokens),
        seen_(seen(job, row, rows_)),
        depth_(job.dk + job.dk2),
        columns_(PairScratch::columns(job.dv)) {
    queries_ = static_cast<const bf16*>(job.q) + first_ * depth_;
    if (depth_ % 2 == 0) return;
    for (int64_t r = 0; r < rows_; ++r) {  // pairs are read whole
      __builtin_memcpy(scratch.queries + r * (depth_ + 1), queries_ + r * depth_, static_cast<size_t>(depth_) * 2);
      scratch.queries[r * (depth_ + 1) + depth_] = {};
    }
    queries_ = scratch.queries;
  }

  // With the keys of the tiles from token `t` on.
  void score(const bf16* keys, int64_t t, int64_t tokens, Ahead* ahead) const {
    const int64_t steps = PairScratch::steps(depth_);
    const int64_t groups = round_up(ceil_div(min_of(tokens, seen_ - t), kPairGroup), 2);
    if (groups <= 0) return;
    pair_product<false>(rows_, {queries_, steps * 2, keys, steps * 2 * kPairGroup, groups, steps, scores_ + t,
                                kRunTokens, ahead, every(ahead, kTileGroups, steps)});
  }

  void soften() const {
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t visible = max_of(0, min_of(seen_, job_.visible[row_ + r] - job_.first));
      soften_run(scores_ + r * kRunTokens, weights_ + r * kRunTokens, visible, round_up(seen_, 32), job_.scale,
                 job_.m[first_ + r], job_.l[first_ + r]);
    }
    __builtin_memset(sums_, 0, static_cast<size_t>(rows_ * columns_) * sizeof(float));
  }

  // With the values of the tiles from token `t` on; groups of columns lie `stride` elements apart.
  void weigh(const bf16* values, int64_t stride, int64_t t, int64_t tokens, Ahead* ahead) const {
    const int64_t steps = ceil_div(min_of(tokens, seen_ - t), 2);
    if (steps <= 0) return;
    const int64_t groups = columns_ / kPairGroup;
    pair_product<true>(rows_, {weights_ + t, kRunTokens, values, stride, groups, steps, sums_, columns_, ahead,
                               every(ahead, groups, kTileTokens / 2)});
  }

  void finish() const {
    for (int64_t r = 0; r < rows_; ++r) {
      __builtin_memcpy(job_.o + (first_ + r) * job_.dv, sums_ + r * columns_,
                       static_cast<size_t>(job_.dv) * sizeof(float));
    }
  }

 private:
  int64_t every(const Ahead* ahead, int64_t groups, int64_t steps) const {
    if (ahead == nullptr) return 0;
    return ahead->every(ceil_div(job_.rows, kPairRows) * ceil_div(groups, rows_ <= 4 ? 4 : 2) * steps);
  }

  const AttendJob& job_;
  const PairScratch& scratch_;
  const int64_t row_, first_, rows_;
  float *scores_, *sums_;
  bf16* weights_;
  const int64_t seen_, depth_, columns_;
  const bf16* queries_;
};

// Which shapes come here; the answer may not depend on how many rows there are.
inline bool takes_pairs(DType dtype, int64_t dk, int64_t dk2, int64_t dv) {
  return dtype == DType::bfloat16 && dk + dk2 <= kPairDepthMax && dv <= kPairDepthMax && (dk2 == 0 || dk % 32 == 0);
}

// Few rows (a decode): tile by tile, in the first cache. Heads take turns, tile by tile: they lie side by side, and
// long stretches are read faster.
void attend_few(const AttendJob& job) {
  const PairScratch scratch(job);
  Ahead ahead(job);
  const auto each = [&](int64_t head, auto&& body) {
    for (int64_t row = 0; row < job.rows; row += kPairRows) {
      body(PairRows(job, scratch, head, row, head * job.rows + row));
    }
  };
  for (int64_t t = 0; t < job.tokens; t += kTileTokens) {
    for (int64_t head = 0; head < job.heads; ++head) {
      pack_keys(job, head, t, scratch.keys, ahead);
      each(head, [&](const PairRows& rows) { rows.score(scratch.keys, t, kTileTokens, &ahead); });
    }
  }
  for (int64_t head = 0; head < job.heads; ++head) {
    each(head, [](const PairRows& rows) { rows.soften(); });
  }
  for (int64_t t = 0; t < job.tokens; t += kTileTokens) {
    for (int64_t head = 0; head < job.heads; ++head) {
      constexpr int64_t kStride = kTileTokens * kPairGroup;
      pack_values(job, head, t, scratch.values, kStride, ahead);
      each(head, [&](const PairRows& rows) { rows.weigh(scratch.values, kStride, t, kTileTokens, &ahead); });
    }
  }
  for (int64_t head = 0; head < job.heads; ++head) {
    each(head, [](const PairRows& rows) { rows.finish(); });
  }
}

// Many rows of one head: a run is packed once, and all rows pass over it.
void attend_many(const AttendJob& job) {
  const PairScratch scratch(job);
  Ahead ahead(job);
  const int64_t steps = PairScratch::steps(job.dk + job.dk2);
  for (int64_t t = 0; t < job.tokens; t += kTileTokens) pack_keys(job, 0, t, scratch.keys + t * steps * 2, ahead);
  const int64_t stride = round_up(job.tokens, kTileTokens) * kPairGroup;
  for (int64_t t = 0; t < job.tokens; t += kTileTokens) {
    pack_values(job, 0, t, scratch.values + t * kPairGroup, stride, ahead);
  }
  for (int64_t row = 0; row < job.rows; row += kPairRows) {
    const PairRows rows(job, scratch, 0, row, 0);
    rows.score(scratch.keys, 0, job.tokens, nullptr);
    rows.soften();
    rows.weigh(scratch.values, stride, 0, job.tokens, nullptr);
    rows.finish();
  }
}

void attend_pairs(const AttendJob& job) {
  job.rows <= plan_of(job.dk + job.dk2, job.dv).few ? attend_few(job) : attend_many(job);
}

}  // namespace
}  // namespace tokenrelay::TOKENRELAY_ISA
#endif

// Online-softmax attention of a block of rows over a run of tokens (Milakov and Gimelshein 2018; Dao et al. 2022), and
// the merge of two runs. Part of isa_*.cpp.
#pragma once

#include "leaf_attention_pairs.hpp"
#include "leaf_math.hpp"

namespace tokenrelay::TOKENRELAY_ISA {
namespace {

constexpr int64_t kWeighAhead = 12;  // tokens

// o[r, column ..] += sum over tokens of p[r, t] * v[t, column ..], NV vectors wide, tokens in order.
template <int MR, int NV, class TV>
inline void weigh_block(const float* p, const TV* const* v, int64_t tokens, int64_t column, float* o, int64_t stride) {
  F acc[MR][NV];
#pragma GCC unroll 4
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < NV; ++i) acc[r][i] = load(o + r * stride + column + i * W);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    const TV* value = v[t] + column;
    if constexpr (MR == 1) {  // waits for memory
      if (t + kWeighAhead < tokens) {
        for (int i = 0; i < NV * W * static_cast<int>(sizeof(TV)); i += 64) {
          __builtin_prefetch(reinterpret_cast<const char*>(v[t + kWeighAhead] + column) + i, 0, 3);
        }
      }
    }
    F lane[NV];
#pragma GCC unroll 8
    for (int i = 0; i < NV; ++i) lane[i] = load(value + i * W);
#pragma GCC unroll 4
    for (int r = 0; r < MR; ++r) {
      const F weight = set1(p[r * kTileTokens + t]);
#pragma GCC unroll 8
      for (int i = 0; i < NV; ++i) acc[r][i] = fma(weight, lane[i], acc[r][i]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < NV; ++i) store(o + r * stride + column + i * W, acc[r][i]);
  }
}

template <int NV, class TV>
void weigh_columns(const float* p, int64_t rows, const TV* const* v, int64_t tokens, int64_t column, float* o,
                   int64_t stride) {
  int64_t r = 0;
  for (; r + ROWS <= rows; r += ROWS) {
    weigh_block<ROWS, NV>(p + r * kTileTokens, v, tokens, column, o + r * stride, stride);
  }
  for (; r < rows; ++r) weigh_block<1, NV>(p + r * kTileTokens, v, tokens, column, o + r * stride, stride);
}

// The last columns, fewer than a vector.
template <class TV>
void weigh_tail(const float* p, int64_t rows, const TV* const* v, int64_t tokens, int64_t column, int64_t n, float* o,
                int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    F acc = load_n(o + r * stride + column, n);
    for (int64_t t = 0; t < tokens; ++t) acc = fma(set1(p[r * kTileTokens + t]), load_n(v[t] + column, n), acc);
    store_n(o + r * stride + column, acc, n);
  }
}

template <class TV>
void weigh(const float* p, int64_t rows, const TV* const* v, int64_t tokens, int64_t dv, float* o) {
  int64_t column = 0;
  if (rows == 1) {
    for (; column + 8 * W <= dv; column += 8 * W) weigh_block<1, 8>(p, v, tokens, column, o, dv);
  }
  for (; column + 4 * W <= dv; column += 4 * W) weigh_columns<4>(p, rows, v, tokens, column, o, dv);
  for (; column + W <= dv; column += W) weigh_columns<1>(p, rows, v, tokens, column, o, dv);
  if (column < dv) weigh_tail(p, rows, v, tokens, column, dv - column, o, dv);
}

inline void scale_row(float* o, int64_t dv, float factor) {
  int64_t i = 0;
  for (; i + W <= dv; i += W) store(o + i, load(o + i) * set1(factor));
  if (i < dv) store_n(o + i, load_n(o + i, dv - i) * set1(factor), dv - i);
}

#ifdef TOKENRELAY_PAIRS
// As weigh_block for 32 * NV columns, two tokens at a time: p is bfloat16 [.., kTileTokens], 0 beyond the last token.
template <int MR, int NV>
inline void weigh_pairs_block(const bf16* p, const bf16* const* v, int64_t tokens, int64_t column, float* o,
                              int64_t stride) {
  F acc[MR][2 * NV];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < 2 * NV; ++i) acc[r][i] = zero();
  }
  for (int64_t t = 0; t < tokens; t += 2) {
    const bf16* even = v[t] + column;
    const bf16* odd = v[t + 1 < tokens ? t + 1 : t] + column;  // its weight is 0 where it repeats
    __m512bh lane[2 * NV];
#pragma GCC unroll 4
    for (int i = 0; i < NV; ++i) {
      const __m512i a = _mm512_loadu_si512(even + 32 * i), b = _mm512_loadu_si512(odd + 32 * i);
      lane[2 * i] = (__m512bh)_mm512_unpacklo_epi16(a, b);
      lane[2 * i + 1] = (__m512bh)_mm512_unpackhi_epi16(a, b);
    }
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      int32_t both;
      __builtin_memcpy(&both, p + r * kTileTokens + t, sizeof both);
      const __m512bh weight = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 8
      for (int i = 0; i < 2 * NV; ++i) acc[r][i] = _mm512_dpbf16_ps(acc[r][i], weight, lane[i]);
    }
  }
  // Unpacking worked within lanes of four columns; put them in order again.
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < NV; ++i) {
      float* to = o + r * stride + column + 32 * i;
      store(to, load(to) + _mm512_permutex2var_ps(acc[r][2 * i], first, acc[r][2 * i + 1]));
      store(to + W, load(to + W) + _mm512_permutex2var_ps(acc[r][2 * i], second, acc[r][2 * i + 1]));
    }
  }
}

template <int NV>
void weigh_pairs_columns(const bf16* p, int64_t rows, const bf16* const* v, int64_t tokens, int64_t column, float* o,
                         int64_t stride) {
  int64_t r = 0;
  for (; r + 6 <= rows; r += 6) {
    weigh_pairs_block<6, NV>(p + r * kTileTokens, v, tokens, column, o + r * stride, stride);
  }
  for (; r + 4 <= rows; r += 4) {
    weigh_pairs_block<4, NV>(p + r * kTileTokens, v, tokens, column, o + r * stride, stride);
  }
  for (; r + 2 <= rows; r += 2) {
    weigh_pairs_block<2, NV>(p + r * kTileTokens, v, tokens, column, o + r * stride, stride);
  }
  for (; r < rows; ++r) weigh_pairs_block<1, NV>(p + r * kTileTokens, v, tokens, column, o + r * stride, stride);
}

// As weigh for bfloat16 values; the weights are rounded to bfloat16 for whole groups of 32 columns.
void weigh_pairs(const float* p, int64_t rows, const bf16* const* v, int64_t tokens, int64_t dv, float* o) {
  constexpr int64_t kRows = 64;
  alignas(64) bf16 rounded[kRows * kTileTokens];
  for (int64_t r = 0; r < rows; r += kRows) {
    const int64_t n = min_of(kRows, rows - r);
    convert_array(p + r * kTileTokens, rounded, n * kTileTokens);
    int64_t column = 0;
    for (; column + 64 <= dv; column += 64) weigh_pairs_columns<2>(rounded, n, v, tokens, column, o + r * dv, dv);
    for (; column + 32 <= dv; column += 32) weigh_pairs_columns<1>(rounded, n, v, tokens, column, o + r * dv, dv);
    if (column < dv) {
      const float* weights = p + r * kTileTokens;
      for (; column + W <= dv; column += W) weigh_columns<1>(weights, n, v, tokens, column, o + r * dv, dv);
      if (column < dv) weigh_tail(weights, n, v, tokens, column, dv - column, o + r * dv, dv);
    }
  }
}
#endif

template <class T>
void weigh_typed(const float* p, int64_t rows, const T* const* v, int64_t count, int64_t dv, float* o) {
#ifdef TOKENRELAY_PAIRS
  if constexpr (sizeof(T) == 2) {
    weigh_pairs(p, rows, v, count, dv, o);
    return;
  }
#endif
  weigh(p, rows, v, count, dv, o);
}

// Turns a row's scores into weights e^(score - maximum) and updates maximum, sum and what was weighed before.
// Tokens from `visible` on get the weight 0.
inline void soften(float* s, int64_t visible, float scale, float& m, float& l, float* o, int64_t dv) {
  for (int64_t t = visible; t < kTileTokens; ++t) s[t] = -__builtin_inff();
  if (visible <= 0) {
    for (int64_t t = 0; t < kTileTokens; ++t) s[t] = 0;
    return;
  }
  F top = set1(-__builtin_inff());
  for (int64_t t = 0; t < kTileTokens; t += W) {
    const F scaled = load(s + t) * set1(scale);
    store(s + t, scaled);
    top = max(top, scaled);
  }
  float highest = largest(top);
  if (highest < m) highest = m;
  if (highest > m) {
    const float factor = exp(m - highest);  // 0 for the first tile, where m is -inf
    l *= factor;
    scale_row(o, dv, factor);
    m = highest;
  }
  F total = zero();
  for (int64_t t = 0; t < kTileTokens; t += W) {
    const F weight = exp(load(s + t) - set1(highest));
    store(s + t, weight);
    total = total + weight;
  }
  l += sum(total);
}

inline void prefetch(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i, 0, 2);
}

// Scores of the first queries of a tile, while the memory that comes next is fetched: blocks lie anywhere, and the
// hardware's prefetcher learns nothing from one to the next.
template <class TQ, class T>
void score_and_prefetch(const AttendJob& job, const TQ* const* q, int64_t rows, int64_t t, int64_t n) {
  const auto k = reinterpret_cast<const T* const*>(job.k);
  constexpr int64_t kSlice = 16;
  for (int64_t c = 0; c < n; c += kSlice) {
    const int64_t slice = min_of(kSlice, n - c);
    for (int64_t i = t + c; i < t + c + slice; ++i) {
      if (job.v[i] != job.k[i]) prefetch(job.v[i], job.dv * static_cast<int64_t>(sizeof(T)));
      if (i + kTileTokens < job.tokens) prefetch(job.k[i + kTileTokens], job.dk * static_cast<int64_t>(sizeof(T)));
    }
    dot_all(q, rows, k + t + c, slice, job.dk, job.scores + c, kTileTokens);
  }
}

template <class T>
void attend_typed(const AttendJob& job) {
  using TQ = typename Partner<T>::type;
  const auto k = reinterpret_cast<const T* const*>(job.k);
  const auto k2 = reinterpret_cast<const T* const*>(job.k2);
  const auto v = reinterpret_cast<const T* const*>(job.v);
  constexpr int64_t kRows = 8;  // queries whose addresses are at hand at once
  const int64_t width = job.dk + job.dk2;
  for (int64_t r = 0; r < job.rows; ++r) {
    job.m[r] = -__builtin_inff();
    job.l[r] = 0;
  }
  __builtin_memset(job.o, 0, static_cast<size_t>(job.rows * job.dv) * sizeof(float));
  for (int64_t t = 0; t < job.tokens; t += kTileTokens) {
    const int64_t n = min_of(kTileTokens, job.tokens - t);
    for (int64_t r = 0; r < job.rows; r += kRows) {
      const int64_t rows = min_of(kRows, job.rows - r);
      const TQ *q[kRows], *q2[kRows];
      for (int64_t i = 0; i < rows; ++i) {
        q[i] = static_cast<const TQ*>(job.q) + (r + i) * width;
        q2[i] = q[i] + job.dk;
      }
      float* scores = job.scores + r * kTileTokens;
      if (r == 0) {
        score_and_prefetch<TQ, T>(job, q, rows, t, n);
      } else {
        dot_all(q, rows, k + t, n, job.dk, scores, kTileTokens);
      }
      if (job.dk2 > 0) {
        alignas(64) float second[kRows * kTileTokens];
        dot_all(q2, rows, k2 + t, n, job.dk2, second, kTileTokens);
        for (int64_t i = 0; i < rows * kTileTokens; ++i) scores[i] += second[i];
      }
    }
    for (int64_t r = 0; r < job.rows; ++r) {
      const int64_t visible = max_of(0, min_of(n, job.visible[r] - job.first - t));
      soften(job.scores + r * kTileTokens, visible, job.scale, job.m[r], job.l[r], job.o + r * job.dv, job.dv);
    }
    weigh_typed(job.scores, job.rows, v + t, n, job.dv, job.o);
  }
}

void weigh_rows(DType dtype, const float* p, int64_t rows, const void* const* v, int64_t count, int64_t dv, float* o) {
  TOKENRELAY_BY_TYPE(dtype, T, weigh_typed(p, rows, reinterpret_cast<const T* const*>(v), count, dv, o));
}

AttendNeeds attend_needs([[maybe_unused]] DType dtype, [[maybe_unused]] int64_t dk, [[maybe_unused]] int64_t dk2,
                         [[maybe_unused]] int64_t dv) {
#ifdef TOKENRELAY_PAIRS
  if (takes_pairs(dtype, dk, dk2, dv)) {
    const PairPlan plan = plan_of(dk + dk2, dv);
    return {plan.shared, plan.held, PairScratch::bytes(dk + dk2, dv)};
  }
#endif
  constexpr int64_t kRows = 64;
  return {kRows, 0, kRows * kTileTokens * static_cast<int64_t>(sizeof(float))};
}

void attend(const AttendJob& job) {
#ifdef TOKENRELAY_PAIRS
  if (takes_pairs(job.dtype, job.dk, job.dk2, job.dv)) return attend_pairs(job);
#endif
  TOKENRELAY_BY_TYPE(job.dtype, T, attend_typed<T>(job));
}

void merge(int64_t rows, int64_t dv, float* m, float* l, float* o, const float* m2, const float* l2, const float* o2) {
  for (int64_t r = 0; r < rows; ++r) {
    if (l2[r] == 0) continue;  // the row saw nothing of the later run
    const float top = m[r] > m2[r] ? m[r] : m2[r];
    const float a = exp(m[r] - top), b = exp(m2[r] - top);
    float* to = o + r * dv;
    const float* from = o2 + r * dv;
    int64_t i = 0;
    for (; i + W <= dv; i += W) store(to + i, fma(load(from + i), set1(b), load(to + i) * set1(a)));
    if (i < dv) store_n(to + i, fma(load_n(from + i, dv - i), set1(b), load_n(to + i, dv - i) * set1(a)), dv - i);
    l[r] = l[r] * a + l2[r] * b;
    m[r] = top;
  }
}

void divide(DType dtype, int64_t dv, float l, const float* o, void* out) {
  TOKENRELAY_BY_TYPE(dtype, T, {
    T* to = static_cast<T*>(out);
    const F factor = set1(1.0f / l);
    int64_t i = 0;
    for (; i + W <= dv; i += W) store(to + i, load(o + i) * factor);
    if (i < dv) store_n(to + i, load_n(o + i, dv - i) * factor, dv - i);
  });
}

}  // namespace
}  // namespace tokenrelay::TOKENRELAY_ISA

// Functions over the lanes of simd_*.hpp: exponential, dot products of row blocks, conversions. Part of isa_*.cpp.
#pragma once

#include "table.hpp"

namespace tokenrelay::TOKENRELAY_ISA {
namespace {

// Queries and activations beside bfloat16 keys and weights: bfloat16 where pairs are multiplied natively.
template <class TB>
struct Partner {
  using type = float;
};
#ifdef TOKENRELAY_PAIRS
template <>
struct Partner<bf16> {
  using type = bf16;
};
#endif

// Runs body<T>() for the element type that `dtype` names.
#define TOKENRELAY_BY_TYPE(dtype, T, ...) \
  do {                                    \
    if ((dtype) == DType::float32) {      \
      using T = float;                    \
      __VA_ARGS__;                        \
    } else {                              \
      using T = bf16;                     \
      __VA_ARGS__;                        \
    }                                     \
  } while (false)

// e^x to about 1 ulp for x in [-87, 88]; 0 below, a NaN stays one. Cody-Waite reduction, Taylor to degree 7.
inline F exp(F x) {
  x = max(set1(-88.0f), min(set1(88.0f), x));  // the order of arguments lets a NaN through
  const F n = round(x * set1(1.44269504f));
  const F r = fma(n, set1(2.12194440e-4f), fma(n, set1(-0.693359375f), x));
  F p = set1(1.0f / 5040);
  p = fma(p, r, set1(1.0f / 720));
  p = fma(p, r, set1(1.0f / 120));
  p = fma(p, r, set1(1.0f / 24));
  p = fma(p, r, set1(1.0f / 6));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  return p * exp2_whole(n);
}

inline float exp(float x) {
  alignas(64) float lanes[W];
  store(lanes, exp(set1(x)));
  return lanes[0];
}

inline F sigmoid(F x) { return set1(1.0f) / (set1(1.0f) + exp(zero() - x)); }

template <class From, class To>
void convert_array(const From* in, To* out, int64_t count) {
  int64_t i = 0;
  for (; i + W <= count; i += W) store(out + i, load(in + i));
  if (i < count) store_n(out + i, load_n(in + i, count - i), count - i);
}

void convert(DType from, const void* in, DType to, void* out, int64_t count) {
  if (from == to) {
    __builtin_memcpy(out, in, static_cast<size_t>(count * size_of(from)));
  } else if (from == DType::float32) {
    convert_array(static_cast<const float*>(in), static_cast<bf16*>(out), count);
  } else {
    convert_array(static_cast<const bf16*>(in), static_cast<float*>(out), count);
  }
}

DType q_type(DType dtype) { return kPairs ? dtype : DType::float32; }

// Few rows wait for memory, and NR short streams are too many for the hardware to learn: where columns lie side by
// side, as they mostly do, this is the next block's. A place beyond the array is never read.
template <int NR, class TB>
inline void fetch_next(const TB* at, int64_t depth) {
  __builtin_prefetch(reinterpret_cast<const char*>(at) + NR * depth * static_cast<int64_t>(sizeof(TB)), 0, 3);
}

// out[r * NR + c] = a[r] . b[c] for MR x NR = ACC pairs. Every pair has one accumulator that walks the depth in order,
// so its result does not depend on the shape of the block it is in.
template <int MR, int NR, class TA, class TB>
inline void dot_block(const TA* const* a, const TB* const* b, int64_t depth, float* out) {
  static_assert(MR * NR == ACC);
  F acc[ACC];
#pragma GCC unroll 16
  for (int i = 0; i < ACC; ++i) acc[i] = zero();
  int64_t d = 0;
  for (; d + W <= depth; d += W) {
    F row[MR];
#pragma GCC unroll 4
    for (int r = 0; r < MR; ++r) row[r] = load(a[r] + d);
#pragma GCC unroll 16
    for (int c = 0; c < NR; ++c) {
      fetch_next<NR>(b[c] + d, depth);
      const F column = load(b[c] + d);
#pragma GCC unroll 4
      for (int r = 0; r < MR; ++r) acc[r * NR + c] = fma(row[r], column, acc[r * NR + c]);
    }
  }
  if (d < depth) {
    for (int c = 0; c < NR; ++c) {
      const F column = load_n(b[c] + d, depth - d);
      for (int r = 0; r < MR; ++r) acc[r * NR + c] = fma(load_n(a[r] + d, depth - d), column, acc[r * NR + c]);
    }
  }
  sums(acc, out);
}

#ifdef TOKENRELAY_PAIRS
inline __m512bh load_pairs(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
inline __m512bh load_pairs_n(const bf16* p, int64_t n) {
  return (__m512bh)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), p);
}

template <int MR, int NR>
inline void dot_block(const bf16* const* a, const bf16* const* b, int64_t depth, float* out) {
  static_assert(MR * NR == ACC);
  F acc[ACC];
#pragma GCC unroll 16
  for (int i = 0; i < ACC; ++i) acc[i] = zero();
  int64_t d = 0;
  for (; d + 2 * W <= depth; d += 2 * W) {
    __m512bh row[MR];
#pragma GCC unroll 4
    for (int r = 0; r < MR; ++r) row[r] = load_pairs(a[r] + d);
#pragma GCC unroll 16
    for (int c = 0; c < NR; ++c) {
      fetch_next<NR>(b[c] + d, depth);
      const __m512bh column = load_pairs(b[c] + d);
#pragma GCC unroll 4
      for (int r = 0; r < MR; ++r) acc[r * NR + c] = _mm512_dpbf16_ps(acc[r * NR + c], row[r], column);
    }
  }
  if (d < depth) {
    for (int c = 0; c < NR; ++c) {
      const __m512bh column = load_pairs_n(b[c] + d, depth - d);
      for (int r = 0; r < MR; ++r) {
        acc[r * NR + c] = _mm512_dpbf16_ps(acc[r * NR + c], load_pairs_n(a[r] + d, depth - d), column);
      }
    }
  }
  sums(acc, out);
}
#endif

// MR rows against all columns; the last columns are filled up by repeating one.
template <int MR, class TA, class TB>
void dot_rows(const TA* const* a, const TB* const* b, int64_t columns, int64_t depth, float* out, int64_t stride) {
  constexpr int NR = ACC / MR;
  float block[ACC];
  const TB* filled[NR];
  for (int64_t c = 0; c < columns; c += NR) {
    const int64_t n = min_of(NR, columns - c);
    const TB* const* from = b + c;
    if (n < NR) {
      for (int i = 0; i < NR; ++i) filled[i] = from[min_of(i, n - 1)];
      from = filled;
    }
    dot_block<MR, NR>(a, from, depth, block);
    if (n == NR) {
      for (int r = 0; r < MR; ++r) __builtin_memcpy(out + r * stride + c, block + r * NR, NR * sizeof(float));
    } else {
      for (int r = 0; r < MR; ++r) {
        for (int64_t i = 0; i < n; ++i) out[r * stride + c + i] = block[r * NR + i];
      }
    }
  }
}

// All rows against all columns. Rows are taken ROWS at a time; the last ones are filled up by repeating one, where that
// costs less than reading the columns again.
template <class TA, class TB>
void dot_all(const TA* const* a, int64_t rows, const TB* const* b, int64_t columns, int64_t depth, float* out,
             int64_t stride) {
  int64_t r = 0;
  for (; r + ROWS <= rows; r += ROWS) dot_rows<ROWS>(a + r, b, columns, depth, out + r * stride, stride);
  const int64_t left = rows - r;
  if constexpr (ROWS >= 4) {
    if (left == 3) {
      const TA* filled[4] = {a[r], a[r + 1], a[r + 2], a[r + 2]};
      alignas(64) float block[4 * kTileTokens];
      for (int64_t c = 0; c < columns; c += kTileTokens) {
        const int64_t n = min_of(kTileTokens, columns - c);
        dot_rows<4>(filled, b + c, n, depth, block, kTileTokens);
        for (int64_t i = 0; i < 3; ++i) {
          __builtin_memcpy(out + (r + i) * stride + c, block + i * kTileTokens, static_cast<size_t>(n) * sizeof(float));
        }
      }
      return;
    }
    if (left == 2) {
      dot_rows<2>(a + r, b, columns, depth, out + r * stride, stride);
      return;
    }
  }
  if (left == 1) dot_rows<1>(a + r, b, columns, depth, out + r * stride, stride);
}

void dot(const DotJob& job) {
  constexpr int64_t kColumns = 64;  // their rows of weights stay in the first cache while all rows of `a` pass
  TOKENRELAY_BY_TYPE(job.dtype, TB, {
    using TA = typename Partner<TB>::type;
    const auto a = reinterpret_cast<const TA* const*>(job.a);
    const auto b = reinterpret_cast<const TB* const*>(job.b);
    const int64_t step = job.rows > ROWS ? 16 : kColumns;
    for (int64_t c = 0; c < job.columns; c += step) {
      dot_all(a, job.rows, b + c, min_of(step, job.columns - c), job.depth, job.out + c, job.out_stride);
    }
  });
}

}  // namespace
}  // namespace tokenrelay::TOKENRELAY_ISA

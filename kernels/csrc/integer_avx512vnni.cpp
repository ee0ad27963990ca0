// Integer products for AVX-512 with VNNI: 64 products of an unsigned and a signed byte an instruction.
#define TOKENRELAY_ISA avx512vnni
#define TOKENRELAY_VNNI
#include "simd_avx512.hpp"
// Then what is written in its terms.
#include "leaf_integer.hpp"
// Needs `widened` of the one before.
#include "leaf_fit.hpp"

namespace tokenrelay {
namespace avx512vnni {
namespace {

inline __m512i bytes(const void* p) { return _mm512_loadu_si512(p); }
inline F widened(__m512i x) { return _mm512_cvtepi32_ps(x); }

// The scale of each lane's element: lanes 0 to 7 hold sums of elements [0, 32) of 64, the others of [32, 64).
inline F halves(const float* scales) { return _mm512_insertf32x8(set1(scales[0]), _mm256_set1_ps(scales[1]), 1); }

// One chunk of one weight row, as bytes: elements [0, 64) and [64, 128).
template <int BITS>
inline void unpack(const uint8_t* row, int64_t chunk, __m512i& low, __m512i& high) {
  if constexpr (BITS == 8) {
    low = bytes(row + chunk * kChunk);
    high = bytes(row + chunk * kChunk + 64);
  } else {
    const __m512i both = bytes(row + chunk * kChunk / 2), mask = _mm512_set1_epi8(15);
    low = _mm512_and_si512(both, mask);
    high = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
  }
}

// MR rows of activations against NR rows of weights; GROUP 0: scaled at the end.
template <int BITS, int GROUP, int MR, int NR>
void dot_block(const IntegerWeights& w, const int64_t* columns, const IntegerRows& rows, const int64_t* a, float* out) {
  static_assert(MR * NR == ACC);
  F acc[ACC];
#pragma GCC unroll 16
  for (int i = 0; i < ACC; ++i) acc[i] = zero();
  const uint8_t* row[NR];
  const float* scales[NR];
  for (int c = 0; c < NR; ++c) {
    row[c] = w.data + columns[c] * w.row_bytes();
    scales[c] = w.scales + columns[c] * w.row_scales();
  }
  const int8_t* x[MR];
  const float* factors[MR];
  const int32_t* zeros[MR];
  for (int r = 0; r < MR; ++r) {
    x[r] = rows.data + a[r] * rows.chunks * kChunk;
    factors[r] = rows.scales + a[r] * rows.chunks;
    zeros[r] = rows.zeros + a[r] * rows.chunks * 2 * kLanes;
  }
  for (int64_t chunk = 0; chunk < rows.chunks; ++chunk) {
    __m512i a0[MR], a1[MR];
    F factor[MR];
#pragma GCC unroll 4
    for (int r = 0; r < MR; ++r) {
      a0[r] = bytes(x[r] + chunk * kChunk);
      a1[r] = bytes(x[r] + chunk * kChunk + 64);
      factor[r] = set1(factors[r][chunk]);
    }
#pragma GCC unroll 16
    for (int c = 0; c < NR; ++c) {
      __m512i low, high;
      unpack<BITS>(row[c], chunk, low, high);
#pragma GCC unroll 4
      for (int r = 0; r < MR; ++r) {
        F& sum = acc[r * NR + c];
        const int32_t* zero = zeros[r] + chunk * 2 * kLanes;
        if constexpr (GROUP == 0 || GROUP == 128) {
          F scale = factor[r];
          if constexpr (GROUP == 128) scale = scale * set1(scales[c][chunk]);
          const __m512i half = _mm512_dpbusd_epi32(bytes(zero), low, a0[r]);
          sum = fma(widened(_mm512_dpbusd_epi32(half, high, a1[r])), scale, sum);
        } else {
          const float* scale = scales[c] + chunk * kChunk / GROUP;
          F first, second;
          if constexpr (GROUP == 64) {
            first = set1(scale[0]);
            second = set1(scale[1]);
          } else {
            first = halves(scale);
            second = halves(scale + 2);
          }
          sum = fma(widened(_mm512_dpbusd_epi32(bytes(zero), low, a0[r])), first * factor[r], sum);
          sum = fma(widened(_mm512_dpbusd_epi32(bytes(zero + kLanes), high, a1[r])), second * factor[r], sum);
        }
      }
    }
  }
  alignas(64) float totals[ACC];
  sums(acc, totals);
  for (int r = 0; r < MR; ++r) {
    for (int c = 0; c < NR; ++c) {
      out[r * NR + c] = GROUP == 0 ? totals[r * NR + c] * scales[c][0] : totals[r * NR + c];
    }
  }
}

template <int BITS, int GROUP, int MR>
void dot_rows(const IntegerDot& job, int64_t r, int64_t count) {
  constexpr int NR = ACC / MR;
  int64_t a[MR], columns[NR];
  float block[ACC];
  for (int i = 0; i < MR; ++i) a[i] = job.a[r + min_of(i, count - 1)];  // the last ones are filled up by repeating one
  for (int64_t c = 0; c < job.columns; c += NR) {
    const int64_t n = min_of(NR, job.columns - c);
    for (int i = 0; i < NR; ++i) columns[i] = job.first + c + min_of(i, n - 1);
    dot_block<BITS, GROUP, MR, NR>(*job.weights, columns, *job.rows, a, block);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < n; ++j) job.out[(r + i) * job.out_stride + c + j] = block[i * NR + j];
    }
  }
}

template <int BITS, int GROUP>
void dot_all(const IntegerDot& job) {
  int64_t r = 0;
  for (; job.count - r > 2; r += 4) dot_rows<BITS, GROUP, 4>(job, r, min_of(4, job.count - r));
  if (job.count - r == 2) dot_rows<BITS, GROUP, 2>(job, r, 2);
  if (job.count - r == 1) dot_rows<BITS, GROUP, 1>(job, r, 1);
}

void dot(const IntegerDot& job) {
  if (job.weights->bits == 8) return dot_all<8, 0>(job);
  if (job.weights->group == 128) return dot_all<4, 128>(job);
  if (job.weights->group == 64) return dot_all<4, 64>(job);
  dot_all<4, 32>(job);
}

}  // namespace
}  // namespace avx512vnni

const IntegerTable& integer_table_avx512vnni() {
  static constexpr IntegerTable table = {avx512vnni::quantize, avx512vnni::dot, avx512vnni::fit};
  return table;
}

}  // namespace tokenrelay

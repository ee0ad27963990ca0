// Eight lanes: AVX2 and FMA.
#pragma once

#include <immintrin.h>

#include "common.hpp"

namespace tokenrelay::avx2 {
namespace {

using F = __m256;
constexpr int W = 8;     // lanes
constexpr int ACC = 8;   // dot products in flight
constexpr int ROWS = 2;  // of the weighted sum in flight
constexpr bool kPairs = false;

inline F set1(float x) { return _mm256_set1_ps(x); }
inline F zero() { return _mm256_setzero_ps(); }
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline F widen(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
inline F load(const bf16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline __m256i first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline F load_n(const float* p, int64_t n) { return _mm256_maskload_ps(p, first_lanes(n)); }
inline F load_n(const bf16* p, int64_t n) {
  alignas(16) uint16_t wide[8] = {};
  for (int64_t i = 0; i < n; ++i) wide[i] = p[i].bits;
  return widen(_mm_load_si128(reinterpret_cast<const __m128i*>(wide)));
}
inline void store(float* p, F x) { _mm256_storeu_ps(p, x); }
inline __m128i narrow(F x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08));
}
inline void store(bf16* p, F x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(x)); }
inline void store_n(float* p, F x, int64_t n) { _mm256_maskstore_ps(p, first_lanes(n), x); }
inline void store_n(bf16* p, F x, int64_t n) {
  alignas(16) uint16_t wide[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(wide), narrow(x));
  for (int64_t i = 0; i < n; ++i) p[i].bits = wide[i];
}
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F max(F a, F b) { return _mm256_max_ps(a, b); }
inline F min(F a, F b) { return _mm256_min_ps(a, b); }
inline F round(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// 2^n for whole n in [-127, 127]; -127 gives 0.
inline F exp2_whole(F n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline float sum(F x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
inline float largest(F x) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}
// out[i] = sum(acc[i]); every sum adds its lanes in the same order.
inline void sums(const F (&acc)[ACC], float* out) {
  const F a = _mm256_hadd_ps(_mm256_hadd_ps(acc[0], acc[1]), _mm256_hadd_ps(acc[2], acc[3]));
  const F b = _mm256_hadd_ps(_mm256_hadd_ps(acc[4], acc[5]), _mm256_hadd_ps(acc[6], acc[7]));
  store(out, _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31)));
}

}  // namespace
}  // namespace tokenrelay::avx2

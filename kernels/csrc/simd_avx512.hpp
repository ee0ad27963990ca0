// Sixteen lanes: AVX-512 F, BW, VL, DQ; included twice, the second time with BF16 pairs (TOKENRELAY_PAIRS).
#include <immintrin.h>

#include "common.hpp"

namespace tokenrelay::TOKENRELAY_ISA {
namespace {

using F = __m512;
constexpr int W = 16;    // lanes
constexpr int ACC = 16;  // dot products in flight
constexpr int ROWS = 4;  // of the weighted sum in flight
#ifdef TOKENRELAY_PAIRS
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif

inline F set1(float x) { return _mm512_set1_ps(x); }
inline F zero() { return _mm512_setzero_ps(); }
inline __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline F widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline F load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline F load_n(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
inline F load_n(const bf16* p, int64_t n) { return widen(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }
inline void store(float* p, F x) { _mm512_storeu_ps(p, x); }
inline __m256i narrow(F x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16));
}
inline void store(bf16* p, F x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x)); }
inline void store_n(float* p, F x, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), x); }
inline void store_n(bf16* p, F x, int64_t n) { _mm256_mask_storeu_epi16(p, first_lanes(n), narrow(x)); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
inline F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// 2^n for whole n in [-127, 127]; -127 gives 0.
inline F exp2_whole(F n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
inline float sum(F x) { return _mm512_reduce_add_ps(x); }
inline float largest(F x) { return _mm512_reduce_max_ps(x); }
// out[i] = sum(acc[i]): a transposing tree, in which every sum adds its lanes in the same order.
inline void sums(const F (&acc)[ACC], float* out) {
  F half[8], quarter[4];
  for (int i = 0; i < 8; ++i) {
    half[i] = _mm512_unpacklo_ps(acc[2 * i], acc[2 * i + 1]) + _mm512_unpackhi_ps(acc[2 * i], acc[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(half[2 * i]), b = _mm512_castps_pd(half[2 * i + 1]);
    quarter[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)) + _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
  }
  // Each quarter holds, per 128-bit lane, partial sums of four accumulators.
  const F a = _mm512_shuffle_f32x4(quarter[0], quarter[1], 0x88) + _mm512_shuffle_f32x4(quarter[0], quarter[1], 0xdd);
  const F b = _mm512_shuffle_f32x4(quarter[2], quarter[3], 0x88) + _mm512_shuffle_f32x4(quarter[2], quarter[3], 0xdd);
  store(out, _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd));
}

}  // namespace
}  // namespace tokenrelay::TOKENRELAY_ISA

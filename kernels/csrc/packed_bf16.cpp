// Packed bfloat16 weights for AVX-512 with BF16: 32 products of pairs an instruction.
#include <immintrin.h>
#define TOKENRELAY_ISA packed_bf16

#include "packed.hpp"

namespace tokenrelay::packed_bf16 {
namespace {

struct Bf16 {
  static constexpr int kNarrow = 4, kWide = 4;  // up to 4 rows take 4 blocks at once
};

constexpr int64_t kAhead = 4096;  // bytes of each stream that are fetched ahead

template <class Kind, int MR, int NR>
inline void dot_block(const PackedDot& job, int64_t block) {
  const PackedWeights& w = *job.weights;
  const int64_t steps = ceil_div(w.depth, 2);
  const char* from = w.data + (job.first + block) * w.block_bytes();
  const int64_t stride = w.block_bytes();
  __m512 acc[MR][NR];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < NR; ++c) acc[r][c] = _mm512_setzero_ps();
  }
  const char* a[MR];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) a[r] = static_cast<const char*>(job.a[r]);
  for (int64_t k = 0; k < steps; ++k) {
    __m512bh column[NR];
#pragma GCC unroll 4
    for (int c = 0; c < NR; ++c) {
      const char* p = from + c * stride + k * 64;
      __builtin_prefetch(p + kAhead, 0, 2);
      column[c] = (__m512bh)_mm512_loadu_si512(p);
    }
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
    for (int c = 0; c < NR; ++c)
      _mm512_storeu_ps(job.out + r * job.out_stride + (block + c) * kBlockColumns, acc[r][c]);
  }
}

}  // namespace
}  // namespace tokenrelay::packed_bf16

#include "leaf_packed.hpp"

namespace tokenrelay {

const PackedKernels& packed_kernels_bf16() {
  static constexpr PackedKernels kernels = {nullptr, packed_bf16::dot_kind<packed_bf16::Bf16>};
  return kernels;
}

}  // namespace tokenrelay

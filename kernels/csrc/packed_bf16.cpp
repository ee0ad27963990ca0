// Packed bfloat16 weights for AVX-512 with BF16: 32 products of pairs an instruction.
#include <immintrin.h>
#define TOKENRELAY_ISA packed_bf16

#include "leaf_rows.hpp"
#include "packed.hpp"

namespace tokenrelay::packed_bf16 {
namespace {

struct Bf16 {
  static constexpr int kRows = 12;              // of a product
  static constexpr int kNarrow = 4, kWide = 4;  // up to 4 rows take 4 blocks at once
};

constexpr int64_t kAhead = 4096;  // bytes of each stream that are fetched ahead

// A function of its own for each shape: what its loop needs just fits the registers.
template <class Kind, int MR, int NR>
[[gnu::noinline]] void dot_block(const PackedDot& job, int64_t block) {
  const PackedWeights& w = *job.weights;
  const int64_t steps = ceil_div(w.depth, 2), stride = w.block_bytes(), mask = job.fetch.mask;
  const char* from = w.data + (job.first + block) * stride;
  const char* next = mask < 0 ? from : job.fetch.next + block / 2 * (steps / (mask + 1)) * 64;
  __m512 acc[MR][NR];
#pragma GCC unroll 12
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < NR; ++c) acc[r][c] = _mm512_setzero_ps();
  }
  const Rows<MR> a(job);
  for (int64_t k = 0; k < steps; ++k) {
    __m512bh column[NR];
#pragma GCC unroll 4
    for (int c = 0; c < NR; ++c) {
      __builtin_prefetch(from + c * stride + kAhead, 0, 2);
      column[c] = (__m512bh)_mm512_loadu_si512(from + c * stride);
    }
    from += 64;
    if ((k & mask) == 0) {
      __builtin_prefetch(next, 0, 2);
      next += 64;
    }
#pragma GCC unroll 12
    for (int r = 0; r < MR; ++r) {
      const __m512bh pair = (__m512bh)_mm512_set1_epi32(a.word(r, k * 4));
#pragma GCC unroll 4
      for (int c = 0; c < NR; ++c) acc[r][c] = _mm512_dpbf16_ps(acc[r][c], column[c], pair);
    }
  }
#pragma GCC unroll 12
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
  static constexpr PackedKernels kernels = {packed_bf16::Bf16::kRows, nullptr,
                                            packed_bf16::dot_kind<packed_bf16::Bf16>};
  return kernels;
}

}  // namespace tokenrelay

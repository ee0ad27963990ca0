// Packed integer weights for AVX-512 with VNNI: 64 products of an unsigned and a signed byte an instruction.
#include <immintrin.h>
#define TOKENRELAY_ISA packed_vnni

#include <cmath>

#include "leaf_rows.hpp"
#include "packed.hpp"

namespace tokenrelay::packed_vnni {
namespace {

template <int BITS, int GROUP>
struct Integers {
  static constexpr int kBits = BITS;
  static constexpr int kGroup = GROUP == 0 ? static_cast<int>(kChunk) : GROUP;  // elements between two scalings
  static constexpr bool kScaled = GROUP != 0;                                   // by a column's group; else at the end
  static constexpr int kStep = BITS == 8 ? 4 : 8;                               // elements of a cache line of a block
  static constexpr int kRows = 8, kNarrow = 2, kWide = 4;
};

constexpr int64_t kAhead = 4096;

// One group of the depth, from its element `at` on: whole[r][c] += activations . weights
template <class Kind, int MR, int NR>
inline void multiply(const char* const* from, const Rows<MR>& a, int64_t at, __m512i (&whole)[MR][NR],
                     const char*& next, int64_t mask) {
  const auto fetch = [&](int k) {
    if ((k & mask) != 0) return;
    __builtin_prefetch(next, 0, 2);
    next += 64;
  };
  const auto word = [&](int r, int64_t element) { return _mm512_set1_epi32(a.word(r, at + element)); };
  if constexpr (Kind::kBits == 8) {
#pragma GCC unroll 2
    for (int k = 0; k < Kind::kGroup / 4; ++k) {
      fetch(k);
      __m512i column[NR];
#pragma GCC unroll 4
      for (int c = 0; c < NR; ++c) {
        __builtin_prefetch(from[c] + k * 64 + kAhead, 0, 2);
        column[c] = _mm512_loadu_si512(from[c] + k * 64);
      }
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r) {
        const __m512i four = word(r, k * 4);
#pragma GCC unroll 4
        for (int c = 0; c < NR; ++c) whole[r][c] = _mm512_dpbusd_epi32(whole[r][c], column[c], four);
      }
    }
  } else {
    const __m512i mask = _mm512_set1_epi8(15);
    for (int k = 0; k < Kind::kGroup / 8; ++k) {
      fetch(k);
      __m512i low[NR], high[NR];
#pragma GCC unroll 4
      for (int c = 0; c < NR; ++c) {
        __builtin_prefetch(from[c] + k * 64 + kAhead, 0, 2);
        const __m512i both = _mm512_loadu_si512(from[c] + k * 64);
        low[c] = _mm512_and_si512(both, mask);
        high[c] = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
      }
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r) {
        const __m512i first = word(r, k * 8), second = word(r, k * 8 + 4);
#pragma GCC unroll 4
        for (int c = 0; c < NR; ++c) {
          whole[r][c] = _mm512_dpbusd_epi32(whole[r][c], low[c], first);
          whole[r][c] = _mm512_dpbusd_epi32(whole[r][c], high[c], second);
        }
      }
    }
  }
}

template <class Kind, int MR, int NR>
[[gnu::noinline]] void dot_block(const PackedDot& job, int64_t block) {
  constexpr int64_t kGroups = kChunk / Kind::kGroup;  // of a chunk
  const PackedWeights& w = *job.weights;
  const int64_t chunks = w.chunks();
  const float* scales = w.scales + (job.first + block) * w.block_scales();
  const int64_t steps = chunks * kChunk / Kind::kStep, mask = job.fetch.mask;
  const char* next = mask < 0 ? w.data : job.fetch.next + block / 2 * (steps / (mask + 1)) * 64;
  const auto packed_row = [&](int r) { return static_cast<const char*>(job.a) + r * job.a_step; };
  __m512 acc[MR][NR];
  const char* from[NR];
  const Rows<MR> a(job, PackedRow::data_at(chunks));
  for (int c = 0; c < NR; ++c) from[c] = w.data + (job.first + block + c) * w.block_bytes();
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < NR; ++c) acc[r][c] = _mm512_setzero_ps();
  }
  for (int64_t g = 0; g < chunks * kGroups; ++g) {
    __m512i whole[MR][NR];
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const int32_t* sums = PackedRow::sums(packed_row(r), chunks) + g * (Kind::kGroup / 32);
      int32_t sum = 0;
      for (int i = 0; i < Kind::kGroup / 32; ++i) sum += sums[i];
      const __m512i zero = _mm512_set1_epi32(-(1 << (Kind::kBits - 1)) * sum);
#pragma GCC unroll 4
      for (int c = 0; c < NR; ++c) whole[r][c] = zero;
    }
    multiply<Kind, MR, NR>(from, a, g * Kind::kGroup, whole, next, mask);
    for (int c = 0; c < NR; ++c) from[c] += Kind::kGroup * kBlockColumns * Kind::kBits / 8;
    __m512 column[NR];
#pragma GCC unroll 4
    for (int c = 0; c < NR; ++c) {
      if constexpr (Kind::kScaled) column[c] = _mm512_loadu_ps(scales + c * w.block_scales() + g * kBlockColumns);
    }
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const __m512 row = _mm512_set1_ps(PackedRow::scales(packed_row(r))[g / kGroups]);
#pragma GCC unroll 4
      for (int c = 0; c < NR; ++c) {
        __m512 scale = row;
        if constexpr (Kind::kScaled) scale = _mm512_mul_ps(row, column[c]);
        acc[r][c] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole[r][c]), scale, acc[r][c]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < NR; ++c) {
      __m512 total = acc[r][c];
      if constexpr (!Kind::kScaled) total = _mm512_mul_ps(total, _mm512_loadu_ps(scales + c * kBlockColumns));
      _mm512_storeu_ps(job.out + r * job.out_stride + (block + c) * kBlockColumns, total);
    }
  }
}

inline float widened(float x) { return x; }
inline float widened(bf16 x) { return to_float(x); }

template <class T>
void quantize_row(const T* x, int64_t depth, void* row) {
  const int64_t chunks = ceil_div(depth, kChunk);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    alignas(64) float part[kChunk] = {};
    alignas(64) int32_t whole[kChunk];
    const int64_t count = min_of(kChunk, depth - chunk * kChunk);
    for (int64_t i = 0; i < count; ++i) part[i] = widened(x[chunk * kChunk + i]);
    float largest = 0, none = 0;
    for (int64_t i = 0; i < kChunk; ++i) {
      largest = std::fabs(part[i]) > largest ? std::fabs(part[i]) : largest;
    }
    for (int64_t i = 0; i < kChunk; ++i) none += part[i] * 0.0f;  // 0, but for a NaN or an infinity
    const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
    PackedRow::scales(row)[chunk] = largest / 127.0f + none;
    for (int64_t i = 0; i < kChunk; ++i) {
      // Adding 1.5 * 2^23 leaves the nearest whole number, ties to even, in the low bits.
      const float shifted = part[i] * inverse + 12582912.0f;
      __builtin_memcpy(&whole[i], &shifted, sizeof shifted);
      whole[i] -= 0x4b400000;
    }
    int8_t* data = PackedRow::data(row, chunks) + chunk * kChunk;
    for (int64_t i = 0; i < kChunk; ++i) data[i] = static_cast<int8_t>(whole[i]);
    for (int64_t part32 = 0; part32 < 4; ++part32) {
      int32_t sum = 0;
      for (int64_t i = 0; i < 32; ++i) sum += data[part32 * 32 + i];  // as stored: what a NaN became counts alike
      PackedRow::sums(row, chunks)[chunk * 4 + part32] = sum;
    }
  }
}

void quantize(DType dtype, const void* x, int64_t depth, void* row) {
  if (dtype == DType::float32) {
    quantize_row(static_cast<const float*>(x), depth, row);
  } else {
    quantize_row(static_cast<const bf16*>(x), depth, row);
  }
}

}  // namespace
}  // namespace tokenrelay::packed_vnni

#include "leaf_packed.hpp"

namespace tokenrelay {
namespace packed_vnni {
namespace {

void dot(const PackedDot& job) {
  if (job.weights->bits == 8) return dot_kind<Integers<8, 0>>(job);
  if (job.weights->group == 128) return dot_kind<Integers<4, 128>>(job);
  if (job.weights->group == 64) return dot_kind<Integers<4, 64>>(job);
  dot_kind<Integers<4, 32>>(job);
}

}  // namespace
}  // namespace packed_vnni

const PackedKernels& packed_kernels_vnni() {
  static constexpr PackedKernels kernels = {packed_vnni::Integers<8, 0>::kRows, packed_vnni::quantize,
                                            packed_vnni::dot};
  return kernels;
}

}  // namespace tokenrelay

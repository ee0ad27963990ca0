// Linear layers over packed weights: 16 columns side by side, in the order in which the products read them, so that a
// matrix streams from memory and no sum crosses lanes. Each lane walks the depth in order: a row of the result depends
// on its own activations only.
//
//   bfloat16: [blocks][depth / 2][16][2]
//   8 bits:   [blocks][chunks * 32][16][4], around the zero point 128, with a scale for each column
//   4 bits:   [blocks][chunks * 16][16][4]: elements 8k + j in the low, 8k + 4 + j in the high nibbles, around 8, with
//             scales [blocks][chunks * 128 / group][16]
//
// A block is 16 columns, the last one filled up with zeros; a chunk is 128 elements of the depth (integer.hpp).
#pragma once

#include "integer.hpp"

namespace tokenrelay {

constexpr int64_t kBlockColumns = 16;
constexpr int64_t kPackedRowsMax = 12;  // of activations that one call of any `dot` takes

struct PackedWeights {
  int bits;       // 16: bfloat16; 8 or 4: integers
  int64_t group;  // of 4 bits: 32, 64 or 128; else 0
  int64_t columns, depth;
  const char* data;
  const float* scales;  // null for bfloat16

  int64_t blocks() const { return ceil_div(columns, kBlockColumns); }
  int64_t chunks() const { return ceil_div(depth, kChunk); }
  int64_t block_bytes() const {
    return bits == 16 ? ceil_div(depth, 2) * 2 * kBlockColumns * 2 : chunks() * kChunk * kBlockColumns * bits / 8;
  }
  int64_t block_scales() const { return kBlockColumns * (group == 0 ? 1 : chunks() * kChunk / group); }
};

// A row of activations as integers: scales [chunks], sums of 32 elements [chunks * 4], bytes [chunks * 128].
struct PackedRow {
  static int64_t bytes(int64_t chunks) { return ceil_div(chunks * (4 + 16 + kChunk), 64) * 64; }
  static float* scales(void* row) { return static_cast<float*>(row); }
  static const float* scales(const void* row) { return static_cast<const float*>(row); }
  static int32_t* sums(void* row, int64_t chunks) { return static_cast<int32_t*>(row) + chunks; }
  static const int32_t* sums(const void* row, int64_t chunks) { return static_cast<const int32_t*>(row) + chunks; }
  static int64_t data_at(int64_t chunks) { return chunks * 20; }
  static int8_t* data(void* row, int64_t chunks) { return static_cast<int8_t*>(row) + data_at(chunks); }
};

// What a product fetches on its way. Its own blocks come some steps before they are multiplied; where rows are many it
// computes for longer than it reads, and has time for blocks that are multiplied later.
struct Fetch {
  const char* next = nullptr;  // of these blocks, a cache line every `mask + 1` steps of each pair of its own
  int64_t mask = -1;           // 0, 1, 3: all ones; -1: none
};

// out[i, c] = a[i] . column c of the blocks [first, first + blocks), i < count <= PackedKernels::rows.
struct PackedDot {
  const PackedWeights* weights;
  int64_t first, blocks;
  const void* a;   // rows: bfloat16 [depth, rounded up to even], or PackedRow
  int64_t a_step;  // bytes from one to the next
  int64_t count;
  float* out;
  int64_t out_stride;
  Fetch fetch;
};

struct PackedKernels {
  int64_t rows;                                                            // that `dot` takes at most
  void (*quantize)(DType dtype, const void* x, int64_t depth, void* row);  // null for bfloat16
  void (*dot)(const PackedDot& job);
};

// Throws std::invalid_argument where this machine has no such kernels: AVX-512 with BF16 (bits 16) or VNNI (8 and 4).
const PackedKernels& packed_kernels(int bits);
// Whether it has.
bool packs(int bits);

// From rows as they lie in a checkpoint ([columns, depth] of bfloat16), or as integer.hpp describes them.
// The destination has blocks * block_bytes (and blocks * block_scales) elements.
void pack(const PackedWeights& shape, const void* rows, const float* row_scales, void* data, float* scales);

struct PackedLinear {
  DType dtype, out_dtype;
  int64_t rows;
  const void* x;
  int64_t x_stride;
  PackedWeights weights;
  const void* bias;           // [columns] of dtype, or null
  void* out;                  // [rows, columns] of out_dtype
  Winner* winners = nullptr;  // [rows]: contended for by the columns (see winners.hpp), nothing is written to out
};
// out = x weights^T + bias, accumulated in float32. bfloat16 weights take bfloat16 activations.
void packed_linear(const Table& table, const PackedLinear& job);

// As moe.hpp's Experts: gate_up of [experts * 2f, d], down of [experts * d, f]; d and f are multiples of kBlockColumns.
struct PackedExperts {
  DType dtype;
  int64_t tokens, top_k, experts, d, f;
  const void* x;  // [tokens, d]
  int64_t x_stride;
  const int32_t* chosen;  // [tokens, top_k]; -1: none
  const float* weights;   // [tokens, top_k]
  PackedWeights gate_up, down;
  void* out;  // [tokens, d]
};
void packed_moe(const Table& table, const PackedExperts& experts);

const PackedKernels& packed_kernels_bf16();
const PackedKernels& packed_kernels_vnni();

}  // namespace tokenrelay

// Linear layers with integer weights. A weight row is stored as unsigned bytes or nibbles around a zero point, with a
// scale for each row (8 bits) or for each group of its elements (4 bits). Activations are rounded to signed bytes, with
// a scale for each chunk; products are summed exactly inside a chunk and in float32 across chunks, in their order.
//
// A row of the result depends on its own activations only.
#pragma once

#include "table.hpp"

namespace tokenrelay {

struct Winner;

constexpr int64_t kChunk = 128;  // elements; rows are filled up to whole chunks
constexpr int64_t kLanes = 16;   // of 4 elements each, in half a chunk: what one instruction multiplies and sums

// Weights [columns, depth]: `data` has 128 bytes a chunk (8 bits), or 64 in which byte j holds elements j (low nibble)
// and j + 64 of the chunk (4 bits). `scales` [columns] where group is 0, else [columns, chunks * kChunk / group].
struct IntegerWeights {
  int bits;
  int64_t group;  // 0, 32, 64 or 128
  int64_t columns, depth;
  const uint8_t* data;
  const float* scales;

  int64_t chunks() const { return (depth + kChunk - 1) / kChunk; }
  int64_t row_bytes() const { return chunks() * kChunk * bits / 8; }
  int64_t row_scales() const { return group == 0 ? 1 : chunks() * kChunk / group; }
  int zero() const { return 1 << (bits - 1); }
  bool whole_chunks() const { return group == 0 || group == kChunk; }  // one scale, at least, for a chunk
};

// Activations [rows, chunks]: bytes, scales, and what takes the weights' zero point out of a sum of products: for each
// lane -zero * (sum of its 4 bytes), or with `whole_chunks` that of both halves in the first one.
struct IntegerRows {
  int64_t chunks;
  int8_t* data;    // [rows, chunks * kChunk]
  float* scales;   // [rows, chunks]
  int32_t* zeros;  // [rows, chunks, 2, kLanes]
};

// out[i, j] = rows[a[i]] . weights[first + j]
struct IntegerDot {
  const IntegerWeights* weights;
  int64_t first, columns;
  const IntegerRows* rows;
  const int64_t* a;  // [count] numbers of rows
  int64_t count;
  float* out;
  int64_t out_stride;
};

struct IntegerTable {
  void (*quantize)(DType dtype, const void* x, const IntegerWeights& beside, const IntegerRows& to, int64_t row);
  void (*dot)(const IntegerDot& job);
  // A row of weights [depth] as integers: row_bytes() and row_scales().
  void (*fit)(DType dtype, const void* row, const IntegerWeights& to, uint8_t* data, float* scales);
};

const IntegerTable& integer_table_baseline();
const IntegerTable& integer_table_avx2();
const IntegerTable& integer_table_avx512vnni();

// Throws std::invalid_argument where this machine cannot run it.
const IntegerTable& integer_table(int isa);

// Rows [columns, depth] of weights as integers, dense; `data` and `scales` of `shape` are not looked at.
void integer_fit(const IntegerTable& integers, DType dtype, const void* rows, const IntegerWeights& shape,
                 uint8_t* data, float* scales);

// out [rows, columns] = x weights^T + bias, in out_dtype.
struct IntegerLinear {
  DType dtype, out_dtype;
  int64_t rows;
  const void* x;
  int64_t x_stride;
  IntegerWeights weights;
  const void* bias;  // [columns] of dtype, or null
  void* out;
  Winner* winners = nullptr;  // [rows]: contended for by the columns (see winners.hpp), nothing is written to out
};
// As moe.hpp's Experts: gate_up of [experts * 2f, d], down of [experts * d, f].
struct IntegerExperts {
  DType dtype;
  int64_t tokens, top_k, experts, d, f;
  const void* x;  // [tokens, d]
  int64_t x_stride;
  const int32_t* chosen;  // [tokens, top_k]; -1: none
  const float* weights;   // [tokens, top_k]
  IntegerWeights gate_up, down;
  void* out;  // [tokens, d]
};
void integer_moe(const IntegerTable& integers, const Table& table, const IntegerExperts& experts);

void integer_linear(const IntegerTable& integers, const Table& table, const IntegerLinear& job);

}  // namespace tokenrelay

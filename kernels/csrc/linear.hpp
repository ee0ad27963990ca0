// Linear layers: few rows of activations against all rows of a weight matrix, which is read once.
#pragma once

#include "table.hpp"

namespace tokenrelay {

struct Winner;

struct Linear {
  DType dtype;      // of x, weight and bias
  DType out_dtype;  // of out: dtype, or float32
  int64_t rows, columns, depth;
  const void* x;  // [rows, depth]
  int64_t x_stride;
  const void* weight;         // [columns, depth]
  const void* bias;           // [columns] or null
  void* out;                  // [rows, columns]
  Winner* winners = nullptr;  // [rows]: contended for by the columns (see winners.hpp), nothing is written to out
};
// out = x weight^T + bias, accumulated in float32. A row of out depends on its own row of x only, whatever `rows` is.
void linear(const Table& table, const Linear& job);

}  // namespace tokenrelay

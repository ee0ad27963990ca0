// Rows of activations as packed products read them.
#pragma once

#include <vector>

#include "packed.hpp"

namespace tokenrelay {

class PackedRows {
 public:
  // x [rows, beside.depth]; bfloat16 rows of even length stay where they are, so x must outlive this.
  PackedRows(const PackedKernels& kernels, DType dtype, const void* x, int64_t rows, int64_t stride,
             const PackedWeights& beside);
  PackedRows(const PackedRows&) = delete;
  PackedRows& operator=(const PackedRows&) = delete;

  const void* row(int64_t r) const { return base_ + r * step_; }
  int64_t bytes() const { return step_; }

 private:
  const char* base_;
  int64_t step_;
  std::vector<char> memory_;
};

// Throws std::invalid_argument for bits or groups that nobody knows.
void check(const PackedWeights& weights);

}  // namespace tokenrelay

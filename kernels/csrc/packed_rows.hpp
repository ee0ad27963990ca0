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
  int64_t bytes() const { return step_; }     // from one to the next
  int64_t length() const { return length_; }  // of one, in bytes
  // Copies of the rows `numbers`, in this order, `length()` bytes from one to the next.
  std::vector<char> gathered(const std::vector<int64_t>& numbers) const;

 private:
  const char* base_;
  int64_t step_, length_;
  std::vector<char> memory_;
};

// Rows that pass over some blocks of weights, a few at a time and about as many each time.
class Passes {
 public:
  // At most `together` rows a pass, though 8 are enough for a product to run at its best.
  Passes(int64_t rows, int64_t together);

  int64_t count() const { return count_; }
  int64_t begin(int64_t pass) const { return rows_ * pass / count_; }
  // What the pass fetches, so that after all of them the panel at `next` (null: none) is in the core's cache, or most
  // of it. One pass waits for memory anyway: it fetches its own.
  Fetch fetch(int64_t pass, const char* next, int64_t bytes) const;

 private:
  int64_t rows_, count_;
};

// Throws std::invalid_argument for bits or groups that nobody knows.
void check(const PackedWeights& weights);

}  // namespace tokenrelay

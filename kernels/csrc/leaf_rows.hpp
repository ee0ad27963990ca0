// Rows of activations at one distance from each other, in as few registers as x86 can address them with.
#pragma once

#include "packed.hpp"

namespace tokenrelay::TOKENRELAY_ISA {
namespace {

template <int MR>
class Rows {
 public:
  explicit Rows(const PackedDot& job, int64_t offset = 0)
      : first_(static_cast<const char*>(job.a) + offset),
        fourth_(first_ + 4 * job.a_step),
        eighth_(first_ + 8 * job.a_step),
        step_(job.a_step),
        three_(3 * job.a_step) {}

  // The 4 bytes at `at` of row r.
  int32_t word(int r, int64_t at) const {
    const char* from = (r < 4 ? first_ : r < 8 ? fourth_ : eighth_) + at;
    from += r % 4 == 0 ? 0 : r % 4 == 1 ? step_ : r % 4 == 2 ? 2 * step_ : three_;
    int32_t four;
    __builtin_memcpy(&four, from, sizeof four);
    return four;
  }

 private:
  const char *first_, *fourth_, *eighth_;
  int64_t step_, three_;
};

}  // namespace
}  // namespace tokenrelay::TOKENRELAY_ISA

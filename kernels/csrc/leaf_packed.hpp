// The shapes in which packed products run: MR rows of activations against NR blocks of columns. Part of packed_*.cpp,
// which define `dot_block<KIND, MR, NR>(job, row, block)`.
#pragma once

#include <utility>

#include "packed.hpp"

namespace tokenrelay::TOKENRELAY_ISA {
namespace {

template <class Kind, int MR>
void dot_rows(const PackedDot& job) {
  constexpr int NR = MR <= Kind::kNarrow ? Kind::kWide : 2;
  int64_t block = 0;
  for (; block + NR <= job.blocks; block += NR) dot_block<Kind, MR, NR>(job, block);
  if constexpr (NR > 2) {
    for (; block + 2 <= job.blocks; block += 2) dot_block<Kind, MR, 2>(job, block);
  }
  for (; block < job.blocks; ++block) dot_block<Kind, MR, 1>(job, block);
}

template <class Kind>
void dot_kind(const PackedDot& job) {
  switch (job.count) {
    case 1:
      return dot_rows<Kind, 1>(job);
    case 2:
      return dot_rows<Kind, 2>(job);
    case 3:
      return dot_rows<Kind, 3>(job);
    case 4:
      return dot_rows<Kind, 4>(job);
    case 5:
      return dot_rows<Kind, 5>(job);
    case 6:
      return dot_rows<Kind, 6>(job);
    case 7:
      return dot_rows<Kind, 7>(job);
    default:
      return dot_rows<Kind, 8>(job);
  }
}

}  // namespace
}  // namespace tokenrelay::TOKENRELAY_ISA

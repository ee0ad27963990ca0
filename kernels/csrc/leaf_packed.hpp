// The shapes in which packed products run: MR rows of activations against NR blocks of columns. Part of packed_*.cpp,
// which define `dot_block<KIND, MR, NR>(job, block)`.
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

template <class Kind, int... ROWS>
void dot_some(const PackedDot& job, std::integer_sequence<int, ROWS...>) {
  (void)((job.count == ROWS + 1 && (dot_rows<Kind, ROWS + 1>(job), true)) || ...);
}

template <class Kind>
void dot_kind(const PackedDot& job) {
  dot_some<Kind>(job, std::make_integer_sequence<int, Kind::kRows>());
}

}  // namespace
}  // namespace tokenrelay::TOKENRELAY_ISA

// Who has the largest logit of a row, found while the vocabulary's projection makes them: none is written.
//
//   Winner winners[rows];                                    // zeros
//   contend(table, winners[r], logits, count, first);        // from any thread, in any order, for each stretch
//   winners[r].token();                                      // the largest, the lowest number among equals
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>

#include "table.hpp"

namespace tokenrelay {

struct Winner {
  std::atomic<uint64_t> key{0};    // ordered logit, then how far from the highest number; 0: nobody yet
  std::atomic<uint8_t> broken{0};  // a logit was no number, or infinite
  int64_t token() const {
    return broken.load() != 0 ? 0 : int64_t{0xffffffff} - static_cast<int64_t>(key.load() & 0xffffffff);
  }
};

namespace {

// Logits x [n] of the tokens from `first` on.
inline void contend(const Table& table, Winner& winner, const float* x, int64_t n, int64_t first) {
  const float top = table.peak(x, n) + 0.0f;  // -0 and 0 are equals
  if (top != top) {
    winner.broken.store(1, std::memory_order_relaxed);
    return;
  }
  uint32_t bits;
  std::memcpy(&bits, &top, sizeof bits);
  const uint64_t order = (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
  uint64_t known = winner.key.load(std::memory_order_relaxed);
  if (order < known >> 32) return;
  int64_t i = 0;
  while (x[i] != top) ++i;
  const uint64_t key = (order << 32) | (0xffffffffu - static_cast<uint32_t>(first + i));
  while (key > known && !winner.key.compare_exchange_weak(known, key, std::memory_order_relaxed)) {
  }
}

}  // namespace
}  // namespace tokenrelay

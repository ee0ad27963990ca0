// Which TPS floors the resident sequences have: a floor of their own that their request names, or everybody's.
//
//     FloorCensus census;
//     census.enter(120);           // a sequence with a floor of its own; 0: everybody's
//     census.highest(70);          // 120: what the device must do for whoever asks most
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>

#include "tokenrelay/scheduler/assert.hpp"

namespace tokenrelay::scheduler {

/// Counted by whole tokens per second, so that all of it is O(1): sixteen words are looked at.
class FloorCensus {
 public:
  static constexpr int tps_max = 1000;  // of a request's own floor

  static constexpr int clamp(std::int64_t tps) noexcept {
    return static_cast<int>(std::clamp<std::int64_t>(tps, 0, tps_max));
  }

  void enter(int tps) noexcept {
    const auto at = static_cast<std::size_t>(tps);
    if (counts_[at]++ == 0) words_[at / 64] |= std::uint64_t{1} << (at % 64);
    ++size_;
  }
  void leave(int tps) noexcept {
    const auto at = static_cast<std::size_t>(tps);
    TR_ASSERT(counts_[at] > 0, "a floor was given back that nobody had");
    if (--counts_[at] == 0) words_[at / 64] &= ~(std::uint64_t{1} << (at % 64));
    --size_;
  }

  /// The highest floor that anybody has, where those without their own have `everybodys`. 0: nobody has one.
  [[nodiscard]] double highest(double everybodys) const noexcept {
    const double shared = counts_[0] > 0 ? everybodys : 0.0;
    for (std::size_t word = words_.size(); word-- > 0;) {
      const std::uint64_t bits = word == 0 ? words_[0] & ~std::uint64_t{1} : words_[word];
      if (bits != 0) return std::max(shared, static_cast<double>(64 * word) + 63 - std::countl_zero(bits));
    }
    return shared;
  }
  [[nodiscard]] int size() const noexcept { return size_; }

 private:
  std::array<std::int32_t, tps_max + 1> counts_{};
  std::array<std::uint64_t, tps_max / 64 + 1> words_{};
  int size_ = 0;
};

}  // namespace tokenrelay::scheduler

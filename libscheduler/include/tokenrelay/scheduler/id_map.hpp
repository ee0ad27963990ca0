// id -> number: an open-addressed table that never grows.
#pragma once

#include <bit>
#include <cstdint>
#include <vector>

#include "tokenrelay/scheduler/assert.hpp"

namespace tokenrelay::scheduler {

class IdMap {
 public:
  static constexpr std::int32_t none = -1;

  explicit IdMap(std::size_t entries_max) : mask_(std::bit_ceil(2 * entries_max + 2) - 1), cells_(mask_ + 1) {}

  [[nodiscard]] std::int32_t find(std::uint64_t id) const noexcept {
    for (std::size_t at = home(id); cells_[at].value != none; at = (at + 1) & mask_) {
      if (cells_[at].id == id) return cells_[at].value;
    }
    return none;
  }
  /// Inserts, or overwrites.
  void set(std::uint64_t id, std::int32_t value) noexcept {
    std::size_t at = home(id);
    while (cells_[at].value != none && cells_[at].id != id) at = (at + 1) & mask_;
    cells_[at] = {id, value};
  }
  void erase(std::uint64_t id) noexcept {
    std::size_t hole = home(id);
    while (cells_[hole].id != id || cells_[hole].value == none) {
      TR_ASSERT(cells_[hole].value != none, "an id was erased that is not there");
      hole = (hole + 1) & mask_;
    }
    for (std::size_t at = (hole + 1) & mask_; cells_[at].value != none; at = (at + 1) & mask_) {
      if (((at - home(cells_[at].id)) & mask_) >= ((at - hole) & mask_)) {
        cells_[hole] = cells_[at];
        hole = at;
      }
    }
    cells_[hole] = {};
  }

 private:
  struct Cell {
    std::uint64_t id = 0;
    std::int32_t value = none;
  };
  [[nodiscard]] std::size_t home(std::uint64_t id) const noexcept {  // the finaliser of splitmix64
    id = (id ^ (id >> 30)) * 0xbf58476d1ce4e5b9ULL;
    id = (id ^ (id >> 27)) * 0x94d049bb133111ebULL;
    return static_cast<std::size_t>(id ^ (id >> 31)) & mask_;
  }

  std::size_t mask_;
  std::vector<Cell> cells_;
};

}  // namespace tokenrelay::scheduler

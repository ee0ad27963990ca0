// block_hash -> block: an open-addressed table that never grows (a block is in it once at most). Of each hash it keeps
// the 32 bits that say where its entry belongs, so that entries move without a look at any block's record; whether it
// is the hash that is looked for, the record says.
#pragma once

#include <cstdint>
#include <vector>

#include "tokenrelay/scheduler/block.hpp"

namespace tokenrelay::scheduler {

class PrefixIndex {
 public:
  explicit PrefixIndex(std::size_t blocks) : cells_(blocks + blocks / 2 + 2) {}

  /// The block with this hash, or no_block. O(1). `records`: of blocks, or of host slots; each has a hash.
  template <class Records>
  [[nodiscard]] BlockId find(const Hash128& hash, const Records& records) const noexcept {
    for (std::size_t at = home(tag(hash)); cells_[at].id != no_block; at = after(at)) {
      if (cells_[at].tag == tag(hash) && records[static_cast<std::size_t>(cells_[at].id)].hash == hash) {
        return cells_[at].id;
      }
    }
    return no_block;
  }

  /// The hash must not be in the table.
  void insert(const Hash128& hash, BlockId id) noexcept {
    std::size_t at = home(tag(hash));
    while (cells_[at].id != no_block) at = after(at);
    cells_[at] = {tag(hash), id};
  }

  /// Removes the entry of `id`, inserted with this hash. Later entries move up, so there are no tombstones.
  void erase(const Hash128& hash, BlockId id) noexcept {
    std::size_t at = home(tag(hash));
    while (cells_[at].id != id) {
      TR_ASSERT(cells_[at].id != no_block, "the prefix index lost a block");
      at = after(at);
    }
    std::size_t hole = at;
    for (at = after(at); cells_[at].id != no_block; at = after(at)) {
      const std::size_t from = home(cells_[at].tag);
      if (distance(from, at) >= distance(hole, at)) {
        cells_[hole] = cells_[at];
        hole = at;
      }
    }
    cells_[hole] = {};
  }

  [[nodiscard]] std::size_t bytes() const noexcept { return cells_.capacity() * sizeof(Cell); }

 private:
  struct Cell {
    std::uint32_t tag = 0;
    BlockId id = no_block;
  };
  [[nodiscard]] std::size_t home(std::uint32_t tag) const noexcept {
    return static_cast<std::size_t>(std::uint64_t{tag} * cells_.size() >> 32);
  }
  [[nodiscard]] std::size_t after(std::size_t at) const noexcept { return at + 1 == cells_.size() ? 0 : at + 1; }
  [[nodiscard]] std::size_t distance(std::size_t from, std::size_t to) const noexcept {
    return to >= from ? to - from : to + cells_.size() - from;
  }
  static std::uint32_t tag(const Hash128& hash) noexcept { return static_cast<std::uint32_t>(hash.low >> 32); }

  std::vector<Cell> cells_;  // at most two thirds are taken
};

}  // namespace tokenrelay::scheduler

// block_hash -> block: an open-addressed table that never grows (a block is in it once at most). It keeps no hashes of
// its own; it compares with the blocks' records.
#pragma once

#include <bit>
#include <cstdint>
#include <vector>

#include "tokenrelay/scheduler/block.hpp"

namespace tokenrelay::scheduler {

class PrefixIndex {
 public:
  explicit PrefixIndex(std::size_t blocks) : mask_(std::bit_ceil(2 * blocks + 2) - 1), cells_(mask_ + 1) {}

  /// The block with this hash, or no_block. O(1).
  [[nodiscard]] BlockId find(const Hash128& hash, const block::Records& records) const noexcept {
    for (std::size_t at = hash.low & mask_; cells_[at].id != no_block; at = (at + 1) & mask_) {
      if (cells_[at].tag == tag(hash) && records[static_cast<std::size_t>(cells_[at].id)].hash == hash) {
        return cells_[at].id;
      }
    }
    return no_block;
  }

  /// The hash must not be in the table.
  void insert(const Hash128& hash, BlockId id) noexcept {
    std::size_t at = hash.low & mask_;
    while (cells_[at].id != no_block) at = (at + 1) & mask_;
    cells_[at] = {tag(hash), id};
  }

  /// Removes the entry of `id`, whose record still has its hash. Later entries move up, so there are no tombstones.
  void erase(const Hash128& hash, BlockId id, const block::Records& records) noexcept {
    std::size_t at = hash.low & mask_;
    while (cells_[at].id != id) {
      TR_ASSERT(cells_[at].id != no_block, "the prefix index lost a block");
      at = (at + 1) & mask_;
    }
    std::size_t hole = at;
    for (at = (at + 1) & mask_; cells_[at].id != no_block; at = (at + 1) & mask_) {
      const std::size_t home = records[static_cast<std::size_t>(cells_[at].id)].hash.low & mask_;
      if (((at - home) & mask_) >= ((at - hole) & mask_)) {
        cells_[hole] = cells_[at];
        hole = at;
      }
    }
    cells_[hole] = {};
  }

 private:
  struct Cell {
    std::uint32_t tag = 0;
    BlockId id = no_block;
  };
  static std::uint32_t tag(const Hash128& hash) noexcept { return static_cast<std::uint32_t>(hash.high); }

  std::size_t mask_;
  std::vector<Cell> cells_;
};

}  // namespace tokenrelay::scheduler

// The order in which cached blocks are evicted. Two policies:
//
//     lru      one list, the block whose last reader left first goes first
//     reuse    one such list for each kind of block (reuse.hpp): of their heads the one that is least likely to come
//              back soon goes first. A block that another one in the index follows is covered: its child goes before
//              it, since whoever wants the child wants it too.
//
// Every operation is O(1): a list's neighbours are in the records, as many heads are compared as there are kinds, and a
// block that is uncovered finds its place among `walk_max` at most.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "tokenrelay/scheduler/block.hpp"
#include "tokenrelay/scheduler/ghosts.hpp"
#include "tokenrelay/scheduler/reuse.hpp"
#include "tokenrelay/scheduler/types.hpp"

namespace tokenrelay::scheduler {

/// Doubly linked through Record::previous and next.
struct BlockList {
  BlockId head = no_block;
  BlockId tail = no_block;
  int size = 0;

  void push_back(BlockId id, block::Records& records) noexcept { insert_after(tail, id, records); }
  /// Behind `before`, or first if that is no_block.
  void insert_after(BlockId before, BlockId id, block::Records& records) noexcept;
  void unlink(BlockId id, block::Records& records) noexcept;
};

/// What a sequence was that leaves its blocks: its pins are given back from the last block to the first.
struct Usage {
  Origin origin = Origin::prompt;
  std::size_t prompt_blocks = SIZE_MAX;  // of its chain; those behind it were sampled
};

class Evictor {
 public:
  static constexpr int walk_max = 32;

  Evictor(Eviction policy, std::size_t blocks) : policy_(policy), ghosts_(policy == Eviction::reuse ? blocks : 0) {}

  void clock(std::int64_t now_us) noexcept {
    now_us_ = now_us;
    model_.clock(now_us);
  }
  void releasing(const Usage& usage) noexcept {
    usage_ = usage;
    uses_ = 0;
  }

  /// The index finds the block now, behind `parent` (or no_block).
  void indexed(BlockId id, BlockId parent, block::Records& records) noexcept;
  /// It does no more. `parent_hash`: what its parent had, which may be gone.
  void forgotten(BlockId id, const Hash128& parent_hash, block::Records& records) noexcept;
  /// Its last reader left; it was block number `index` of that sequence.
  void cached(BlockId id, std::size_t index, block::Records& records) noexcept {
    left(id, index, records);
    restored(id, records);
  }
  // The same in two steps, when a write-back still pins the block. Its last reader left ...
  void left(BlockId id, std::size_t index, block::Records& records) noexcept;
  /// ... somebody found it again before the write-back ended ...
  void found(const block::Record& record) noexcept {
    if (policy_ == Eviction::reuse && ghosts_.sampled(record.hash))
      model_.reused(record.reuse_kind, now_us_ - record.used_us);
  }
  /// ... or the write-back ended: it stands where it would stand without.
  void restored(BlockId id, block::Records& records) noexcept;
  /// A write-back begins to read a cached block.
  void lifted(BlockId id, block::Records& records) noexcept;
  /// A cached block has a reader again.
  void taken(BlockId id, block::Records& records) noexcept;
  /// A block has one more reader.
  static void shared(block::Record& record) noexcept {
    if (record.uses < uses_max) ++record.uses;
  }
  /// The block to evict next, out of its list; no_block if none is cached.
  BlockId evict(block::Records& records) noexcept;

  [[nodiscard]] int size() const noexcept { return size_; }
  [[nodiscard]] const ReuseModel& model() const noexcept { return model_; }
  [[nodiscard]] std::size_t bytes() const noexcept { return sizeof(*this) + ghosts_.bytes(); }
  [[nodiscard]] std::optional<std::string> check(const block::Records& records) const;

 private:
  static constexpr std::uint8_t uses_max = 100;

  BlockList& list_of(const block::Record& record) noexcept {
    return record.covered ? covered_ : lists_[record.reuse_kind];
  }
  [[nodiscard]] BlockId choose(const block::Records& records) const noexcept;
  void uncover(BlockId id, block::Records& records) noexcept;
  void gone(const std::optional<Ghosts::Ghost>& ghost) noexcept;

  Eviction policy_;
  std::int64_t now_us_ = 0;
  Usage usage_;
  std::uint8_t uses_ = 0;  // of the blocks behind, in the sequence that is leaving: its prefix has no fewer
  int size_ = 0;
  std::array<BlockList, reuse_kinds> lists_;
  BlockList covered_;
  ReuseModel model_;
  Ghosts ghosts_;
};

// An admission does this for each block that it finds: here, so that its loop sees it.
inline void BlockList::unlink(BlockId id, block::Records& records) noexcept {
  const block::Record& record = records[static_cast<std::size_t>(id)];
  (record.previous == no_block ? head : records[static_cast<std::size_t>(record.previous)].next) = record.next;
  (record.next == no_block ? tail : records[static_cast<std::size_t>(record.next)].previous) = record.previous;
  --size;
}

inline void Evictor::taken(BlockId id, block::Records& records) noexcept {
  block::Record& record = records[static_cast<std::size_t>(id)];
  --size_;
  list_of(record).unlink(id, records);
  if (policy_ == Eviction::lru) return;
  record.covered = false;
  found(record);
}

}  // namespace tokenrelay::scheduler

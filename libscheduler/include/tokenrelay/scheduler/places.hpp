// Places of sequences in lists: the board of those that wait for a block, the lists of running ones, slots. The waiting
// queue is in waiting.hpp.
// A place is a linear token that a state holds; a list changes only by `enter` and `leave`. All of it is O(1), but for
// the walk past those who came earlier when a sequence comes back.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "tokenrelay/scheduler/assert.hpp"
#include "tokenrelay/scheduler/block.hpp"

namespace tokenrelay::scheduler {

using SequenceIndex = std::int32_t;  // of the scheduler's table of sequences
inline constexpr SequenceIndex no_sequence = -1;

/// Who goes first: the lower priority class, inside a class who came first.
struct Rank {
  int priority_class = 0;
  std::uint64_t ticket = 0;  // counts submissions
  friend constexpr auto operator<=>(const Rank&, const Rank&) noexcept = default;
};

/// Being in one list. Linear: given back to the list it came from.
template <class Tag>
class Place {
 public:
  Place(const Place&) = delete;
  Place& operator=(const Place&) = delete;
  Place(Place&& other) noexcept : index_(std::exchange(other.index_, no_sequence)) {}
  Place& operator=(Place&& other) noexcept {
    TR_ASSERT(index_ == no_sequence, "a sequence's place was overwritten");
    index_ = std::exchange(other.index_, no_sequence);
    return *this;
  }
  ~Place() { TR_ASSERT(index_ == no_sequence, "a sequence's place was dropped"); }

 private:
  friend Tag;
  explicit Place(SequenceIndex index) noexcept : index_(index) {}
  [[nodiscard]] SequenceIndex give_back() && noexcept {
    TR_ASSERT(index_ != no_sequence, "a moved-from place was used");
    return std::exchange(index_, no_sequence);
  }
  SequenceIndex index_;
};

/// Doubly linked, in the order of rank. The links and ranks are arrays that lists share: a sequence is in one at a
/// time.
class RankedList {
 public:
  struct Link {
    SequenceIndex previous = no_sequence;
    SequenceIndex next = no_sequence;
  };

  [[nodiscard]] SequenceIndex first() const noexcept { return first_; }
  [[nodiscard]] SequenceIndex last() const noexcept { return last_; }
  [[nodiscard]] int size() const noexcept { return size_; }

  void insert_from_back(SequenceIndex index, std::vector<Link>& links, const std::vector<Rank>& ranks) noexcept {
    SequenceIndex before = last_;
    while (before != no_sequence && rank(ranks, index) < rank(ranks, before)) before = link(links, before).previous;
    insert_after(before, index, links);
  }
  void insert_from_front(SequenceIndex index, std::vector<Link>& links, const std::vector<Rank>& ranks) noexcept {
    SequenceIndex before = no_sequence;
    SequenceIndex at = first_;
    while (at != no_sequence && rank(ranks, at) < rank(ranks, index)) {
      before = at;
      at = link(links, at).next;
    }
    insert_after(before, index, links);
  }
  void remove(SequenceIndex index, std::vector<Link>& links) noexcept {
    const Link& own = link(links, index);
    (own.previous == no_sequence ? first_ : link(links, own.previous).next) = own.next;
    (own.next == no_sequence ? last_ : link(links, own.next).previous) = own.previous;
    --size_;
  }

 private:
  static Link& link(std::vector<Link>& links, SequenceIndex index) noexcept {
    return links[static_cast<std::size_t>(index)];
  }
  static const Rank& rank(const std::vector<Rank>& ranks, SequenceIndex index) noexcept {
    return ranks[static_cast<std::size_t>(index)];
  }
  void insert_after(SequenceIndex before, SequenceIndex index, std::vector<Link>& links) noexcept {
    const SequenceIndex after = before == no_sequence ? first_ : link(links, before).next;
    link(links, index) = {before, after};
    (before == no_sequence ? first_ : link(links, before).next) = index;
    (after == no_sequence ? last_ : link(links, after).previous) = index;
    ++size_;
  }

  SequenceIndex first_ = no_sequence;
  SequenceIndex last_ = no_sequence;
  int size_ = 0;
};

using Links = std::vector<RankedList::Link>;
using Ranks = std::vector<Rank>;

/// Sequences that are resident in one phase, in the order of rank.
template <class Phase>
class RunningList {
 public:
  using Token = Place<RunningList>;
  RunningList(Links& links, const Ranks& ranks) noexcept : links_(links), ranks_(ranks) {}

  [[nodiscard]] Token enter(SequenceIndex index) noexcept {
    list_.insert_from_back(index, links_, ranks_);
    return Token(index);
  }
  SequenceIndex leave(Token&& token) noexcept {
    const SequenceIndex index = std::move(token).give_back();
    list_.remove(index, links_);
    return index;
  }
  [[nodiscard]] SequenceIndex first() const noexcept { return list_.first(); }
  [[nodiscard]] SequenceIndex last() const noexcept { return list_.last(); }
  [[nodiscard]] int size() const noexcept { return list_.size(); }
  [[nodiscard]] SequenceIndex after(SequenceIndex index) const noexcept {
    return links_[static_cast<std::size_t>(index)].next;
  }
  [[nodiscard]] SequenceIndex before(SequenceIndex index) const noexcept {
    return links_[static_cast<std::size_t>(index)].previous;
  }

 private:
  Links& links_;
  const Ranks& ranks_;
  RankedList list_;
};
using PrefillList = RunningList<struct PrefillPhase>;
using DecodeList = RunningList<struct DecodePhase>;
using LoadList = RunningList<struct LoadPhase>;

/// Sequences whose next blocks somebody computes at this moment: each waits for one block, in a list of that block.
class HoldBoard {
 public:
  using Token = Place<HoldBoard>;
  HoldBoard(Links& links, std::size_t sequences, std::size_t blocks)
      : links_(links), block_of_(sequences, no_block), heads_(blocks, no_sequence) {}

  [[nodiscard]] Token enter(SequenceIndex index, BlockId id) noexcept {
    SequenceIndex& head = heads_[static_cast<std::size_t>(id)];
    link(index) = {no_sequence, head};
    if (head != no_sequence) link(head).previous = index;
    head = index;
    block_of_[static_cast<std::size_t>(index)] = id;
    ++size_;
    return Token(index);
  }
  SequenceIndex leave(Token&& token) noexcept {
    const SequenceIndex index = std::move(token).give_back();
    const RankedList::Link own = link(index);
    if (own.previous == no_sequence) {
      heads_[static_cast<std::size_t>(block_of_[static_cast<std::size_t>(index)])] = own.next;
    } else {
      link(own.previous).next = own.next;
    }
    if (own.next != no_sequence) link(own.next).previous = own.previous;
    --size_;
    return index;
  }
  [[nodiscard]] SequenceIndex first(BlockId id) const noexcept { return heads_[static_cast<std::size_t>(id)]; }
  [[nodiscard]] BlockId block_of(SequenceIndex index) const noexcept {
    return block_of_[static_cast<std::size_t>(index)];
  }
  [[nodiscard]] int size() const noexcept { return size_; }
  /// Of what it keeps for blocks.
  [[nodiscard]] std::size_t bytes() const noexcept { return heads_.capacity() * sizeof(SequenceIndex); }

 private:
  RankedList::Link& link(SequenceIndex index) noexcept { return links_[static_cast<std::size_t>(index)]; }

  Links& links_;
  std::vector<BlockId> block_of_;
  std::vector<SequenceIndex> heads_;  // by block
  int size_ = 0;
};

/// Rows of the block table. A row is leased to one sequence until the last launched step that held it is committed.
class SlotPool {
 public:
  class Lease {
   public:
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    Lease(Lease&& other) noexcept : slot_(std::exchange(other.slot_, -1)) {}
    Lease& operator=(Lease&& other) noexcept {
      TR_ASSERT(slot_ < 0, "a slot's lease was overwritten");
      slot_ = std::exchange(other.slot_, -1);
      return *this;
    }
    ~Lease() { TR_ASSERT(slot_ < 0, "a slot's lease was dropped"); }
    [[nodiscard]] std::int32_t slot() const noexcept { return slot_; }

   private:
    friend class SlotPool;
    explicit Lease(std::int32_t slot) noexcept : slot_(slot) {}
    std::int32_t slot_;
  };

  explicit SlotPool(int slots) {
    free_.reserve(static_cast<std::size_t>(slots));
    for (int slot = slots - 1; slot >= 0; --slot) free_.push_back(slot);
  }
  [[nodiscard]] int free() const noexcept { return static_cast<int>(free_.size()); }
  /// Only when `free() > 0`.
  [[nodiscard]] Lease lease() noexcept {
    TR_ASSERT(!free_.empty(), "no slot is free");
    const std::int32_t slot = free_.back();
    free_.pop_back();
    return Lease(slot);
  }
  void give_back(Lease&& lease) noexcept {
    TR_ASSERT(lease.slot_ >= 0, "a moved-from lease was used");
    free_.push_back(std::exchange(lease.slot_, -1));
  }

 private:
  std::vector<std::int32_t> free_;
};

}  // namespace tokenrelay::scheduler

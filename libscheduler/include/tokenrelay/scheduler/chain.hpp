// The blocks of one sequence, in the order of its tokens: pins on sealed ones, then those that launched steps write,
// then those it may write next. And what is left of it when the sequence ends before its launched steps do.
#pragma once

#include <algorithm>
#include <cstddef>
#include <optional>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "tokenrelay/scheduler/block.hpp"
#include "tokenrelay/scheduler/pool.hpp"

namespace tokenrelay::scheduler {

/// A bounded queue of block handles of one state. Room is reserved beforehand, so that pushing cannot fail.
template <class T>
class Lane {
 public:
  Lane() noexcept = default;
  explicit Lane(std::size_t room) { ids_.reserve(room); }
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;
  Lane(Lane&& other) noexcept : ids_(std::exchange(other.ids_, {})), head_(std::exchange(other.head_, 0)) {}
  Lane& operator=(Lane&& other) noexcept {
    TR_ASSERT(empty(), "a lane of block handles was overwritten");
    ids_.swap(other.ids_);
    head_ = std::exchange(other.head_, 0);
    other.ids_.clear();
    return *this;
  }
  ~Lane() { TR_ASSERT(empty(), "a lane of block handles was dropped"); }

  [[nodiscard]] bool empty() const noexcept { return head_ == ids_.size(); }
  [[nodiscard]] std::size_t size() const noexcept { return ids_.size() - head_; }
  [[nodiscard]] std::span<const BlockId> numbers() const noexcept { return {ids_.data() + head_, size()}; }
  [[nodiscard]] BlockId last() const noexcept { return empty() ? no_block : ids_.back(); }

  void push_back(T&& handle) noexcept {
    TR_ASSERT(ids_.size() < ids_.capacity(), "a lane of block handles is full");
    ids_.push_back(block::Access::dissolve(std::move(handle)));
  }
  [[nodiscard]] T pop_back() noexcept {
    TR_ASSERT(!empty(), "a lane of block handles is empty");
    const BlockId id = ids_.back();
    ids_.pop_back();
    return block::Access::make<T>(id);
  }
  [[nodiscard]] T pop_front() noexcept {
    TR_ASSERT(!empty(), "a lane of block handles is empty");
    const BlockId id = ids_[head_++];
    if (2 * head_ >= ids_.size()) {  // amortised O(1): as many were popped as move now
      ids_.erase(ids_.begin(), ids_.begin() + static_cast<std::ptrdiff_t>(head_));
      head_ = 0;
    }
    return block::Access::make<T>(id);
  }
  void reverse() noexcept { std::reverse(ids_.begin() + static_cast<std::ptrdiff_t>(head_), ids_.end()); }
  /// Sends `event` to the handle at `index`, which keeps its state.
  template <class Event>
  void apply(std::size_t index, Event&& event) noexcept {
    static_assert(std::is_same_v<fsm::Next<T, Event>, T>);
    BlockId& cell = ids_[head_ + index];
    cell = block::Access::dissolve(on(block::Access::make<T>(cell), std::forward<Event>(event)));
  }
  /// The same blocks in another state: `change` makes each handle T into a U. Allocates nothing.
  template <class U, class Change>
  [[nodiscard]] Lane<U> retype(Change&& change) && noexcept {
    for (std::size_t i = head_; i < ids_.size(); ++i) {
      ids_[i] = block::Access::dissolve(change(block::Access::make<T>(ids_[i])));
    }
    return Lane<U>(std::exchange(ids_, {}), std::exchange(head_, 0));
  }

 private:
  template <class U>
  friend class Lane;
  Lane(std::vector<BlockId>&& ids, std::size_t head) noexcept : ids_(std::move(ids)), head_(head) {}

  std::vector<BlockId> ids_;
  std::size_t head_ = 0;
};

/// Gives the content of the sequence's i-th full block.
template <class T>
concept ContentSource = requires(T& source, std::size_t index) {
  { source.content(index) } noexcept -> std::same_as<Content>;
};

class Remains;

/// The blocks of a sequence that runs.
class BlockChain {
 public:
  /// Room for `blocks_max` blocks, of which launched steps write `launched_max` at most.
  BlockChain(std::size_t blocks_max, std::size_t launched_max)
      : sealed_(blocks_max), in_flight_(2 * launched_max + 2), writable_(blocks_max) {}

  [[nodiscard]] std::size_t size() const noexcept { return sealed_.size() + in_flight_.size() + writable_.size(); }
  [[nodiscard]] const Lane<SealedPin>& sealed() const noexcept { return sealed_; }
  [[nodiscard]] const Lane<InFlightBlock>& in_flight() const noexcept { return in_flight_; }
  [[nodiscard]] const Lane<WritableBlock>& writable() const noexcept { return writable_; }

  /// Appends a block that was found in the cache. Only before anything else.
  void append(SealedPin&& pin) noexcept { sealed_.push_back(std::move(pin)); }
  /// At admission: appends the blocks of the rest of the prompt, in order, then `filled` once.
  void fill(WritableBlock&& block) noexcept { writable_.push_back(std::move(block)); }
  void filled() noexcept { writable_.reverse(); }
  /// Appends a block when all others are full.
  void append(WritableBlock&& block) noexcept {
    TR_ASSERT(writable_.empty(), "a block is appended when all others are used");
    writable_.push_back(std::move(block));
  }

  /// Appends a block behind the one that is written next, or when all are full: for tokens of a draft.
  void reserve(WritableBlock&& block) noexcept {
    TR_ASSERT(writable_.size() <= 1, "a draft's block comes behind the last one");
    writable_.push_back(std::move(block));
    writable_.reverse();
  }

  /// A step that writes tokens [start, start + length) was planned, or a transfer that may write none.
  void launch(block::Records& records, int start, int length, int block_tokens) noexcept;
  /// Nobody writes the blocks that were launched, and what they hold is worth nothing: they are to be written anew.
  void unlaunch(block::Records& records) noexcept;
  /// That step was committed: its full blocks become Sealed.
  template <ContentSource Source>
  void land(BlockPool& pool, int start, int length, int block_tokens, Source& source) noexcept;

  /// A step was committed that wrote [start, start + length), of which the first `kept` stand, one at least: a block
  /// that is full of those becomes Sealed, one that holds none of them is given back.
  template <ContentSource Source>
  void land_draft(BlockPool& pool, int start, int length, int kept, int block_tokens, Source& source) noexcept;

  /// The partial last block of a prompt whose rows are all committed becomes readable; nothing when the prompt ends
  /// with a full one.
  [[nodiscard]] std::optional<SealedPin> seal_rest(BlockPool& pool) noexcept {
    TR_ASSERT(in_flight_.empty() && writable_.size() <= 1, "a prompt that is not computed has no last block");
    if (writable_.empty()) return std::nullopt;
    return pool.seal_nameless(writable_.pop_back());
  }

  /// The text is over, and `rest` is its end, behind the full blocks: that block is sealed if no launched step writes
  /// it. What is left to be sealed by `Remains`, when that step has landed.
  [[nodiscard]] std::optional<Content> keep_rest(BlockPool& pool, const std::optional<Content>& rest) noexcept;

  /// Gives back what no launched step writes: no row of the sequence will be planned.
  void trim(BlockPool& pool) noexcept {
    while (!writable_.empty()) pool.release(writable_.pop_back());
  }
  /// The sequence is over: what no step writes is free at once, the rest waits.
  [[nodiscard]] Remains abandon(BlockPool& pool, const std::optional<Content>& rest = std::nullopt) && noexcept;

 private:
  Lane<SealedPin> sealed_;
  Lane<InFlightBlock> in_flight_;
  Lane<WritableBlock> writable_;  // the next one to write is the last
};

/// What launched steps may still read (the pins) or write (the quarantined blocks) of a sequence that is over.
class Remains {
 public:
  Remains(Lane<SealedPin>&& pins, Lane<QuarantinedBlock>&& quarantined, const std::optional<Content>& rest) noexcept
      : first_(pins.size()), pins_(std::move(pins)), quarantined_(std::move(quarantined)), rest_(rest) {}

  /// A launched step that wrote tokens [start, start + length) was committed.
  void land(BlockPool& pool, int start, int length, int block_tokens) noexcept;
  /// The first quarantined block, for whoever knows that something may still write it.
  [[nodiscard]] QuarantinedBlock hand_on() noexcept {
    ++first_;
    return quarantined_.pop_front();
  }
  /// The last one was: full blocks stay as cache, the end of the chain being the first to be evicted.
  void release(BlockPool& pool) && noexcept;
  [[nodiscard]] const Lane<SealedPin>& pins() const noexcept { return pins_; }
  [[nodiscard]] const Lane<QuarantinedBlock>& quarantined() const noexcept { return quarantined_; }

 private:
  std::size_t first_;  // which block of the sequence the first quarantined one is
  Lane<SealedPin> pins_;
  Lane<QuarantinedBlock> quarantined_;
  std::optional<Content> rest_;  // what the first quarantined block holds of the text; its tokens live as long
};

template <ContentSource Source>
void BlockChain::land(BlockPool& pool, int start, int length, int block_tokens, Source& source) noexcept {
  if (length == 0) return;
  const auto first = static_cast<std::size_t>(start / block_tokens);
  const auto last = static_cast<std::size_t>((start + length - 1) / block_tokens);
  for (std::size_t index = first; index <= last; ++index) {
    const std::size_t at = index - sealed_.size();
    const BlockId id = in_flight_.numbers()[at];
    if (pool.records()[static_cast<std::size_t>(id)].writers > 1) {
      in_flight_.apply(at, block::Land{pool.records()});
      continue;
    }
    TR_ASSERT(at == 0, "blocks of a sequence land in order");
    WritableBlock block = on(in_flight_.pop_front(), block::LandLast{pool.records()});
    if (start + length >= static_cast<int>(index + 1) * block_tokens) {
      sealed_.push_back(pool.seal(std::move(block), source.content(index)));
    } else {
      writable_.push_back(std::move(block));
    }
  }
}

template <ContentSource Source>
void BlockChain::land_draft(BlockPool& pool, int start, int length, int kept, int block_tokens,
                            Source& source) noexcept {
  TR_ASSERT(kept >= 1 && kept <= length && writable_.empty(), "a row with a draft gives a token, and is alone");
  const int last = (start + length - 1) / block_tokens;
  for (int index = start / block_tokens; index <= last; ++index) {
    WritableBlock block = on(in_flight_.pop_front(), block::LandLast{pool.records()});
    if (start + kept >= (index + 1) * block_tokens) {
      sealed_.push_back(pool.seal(std::move(block), source.content(static_cast<std::size_t>(index))));
    } else if (start + kept > index * block_tokens) {
      writable_.push_back(std::move(block));
    } else {
      pool.release(std::move(block));
    }
  }
}

}  // namespace tokenrelay::scheduler

// The host tier of KV: which sealed blocks are written back to host memory, which are loaded again, and every copy in
// flight with its deadline.
//
//     tier.write_back(now_us);                                      // at the end of a plan: what was sealed lately
//     CopyIndex load = tier.load(hash, block, sequence, now_us);    // a prompt continues in host memory
//     tier.take(copies);                                            // for whoever copies ...
//     auto ended = tier.end(id, true);                              // ... and says when a copy has ended
//     tier.expire(now_us, give_up);                                 // what is overdue is reported
//
// A block is written back a while after it was sealed, in the order of sealing, if it is still there: a copy at its
// eviction would keep whoever needs the block waiting for it, and in this order a prefix is seldom there without what
// comes before it. Every operation is O(1) for each copy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "tokenrelay/scheduler/copy.hpp"
#include "tokenrelay/scheduler/host_pool.hpp"
#include "tokenrelay/scheduler/places.hpp"
#include "tokenrelay/scheduler/types.hpp"

namespace tokenrelay::scheduler {

class HostTier {
 public:
  static constexpr int write_backs_a_step = 32;
  static constexpr int pool_share = 8;         // one in so many blocks may be pinned by write-backs ...
  static constexpr int write_backs_least = 4;  // ... but in a small pool so many may be in flight

  HostTier(BlockPool& pool, const Config& config, std::size_t loads_max);
  HostTier(const HostTier&) = delete;
  HostTier& operator=(const HostTier&) = delete;
  ~HostTier() { stop(); }

  [[nodiscard]] bool on() const noexcept { return host_.slots() > 0; }
  [[nodiscard]] bool holds(const Hash128& hash) const noexcept { return host_.find(hash).readable; }
  /// Loads that may begin now.
  [[nodiscard]] int loads_free() const noexcept { return loads_max_ - loads_; }
  /// Loads in flight that will end before their deadline, as far as one knows.
  [[nodiscard]] int loads_timely() const noexcept { return loads_ - loads_late_; }
  /// Of these, the ones that will give a block back.
  [[nodiscard]] int orphans_timely() const noexcept { return orphans_; }

  void write_back(std::int64_t now_us) noexcept;
  /// Only when `holds(hash)` and `loads_free() > 0`.
  [[nodiscard]] CopyIndex load(const Hash128& hash, BlockId block, SequenceIndex reader, std::int64_t now_us) noexcept;
  [[nodiscard]] bool landed(CopyIndex index) const noexcept {
    return std::holds_alternative<copy::Landed>(at(index).state);
  }
  /// Its sequence took note of how it ended.
  void collect(CopyIndex index) noexcept;
  /// Its sequence gave up; a copy that has ended gives the block back at once.
  void orphan(CopyIndex index, QuarantinedBlock&& target) noexcept;

  struct Ended {
    bool known = false;                  // else: no copy of this id is in flight
    SequenceIndex reader = no_sequence;  // that waits for it
  };
  Ended end(std::uint64_t id, bool well) noexcept;
  /// Copies whose deadline passed. `give_up(sequence)`: it waits for such a load, and orphans all of its loads.
  template <class GiveUp>
  void expire(std::int64_t now_us, GiveUp&& give_up) noexcept {
    while (first_ != none && at(first_).deadline_us <= now_us) {
      const CopyIndex index = first_;
      if (std::holds_alternative<copy::Loading>(at(index).state)) give_up(at(index).reader);
      late(index);
    }
  }
  [[nodiscard]] std::optional<std::int64_t> deadline_us() const noexcept {
    return first_ == none ? std::nullopt : std::optional(at(first_).deadline_us);
  }
  /// What is to be copied since the last call; `out` is cleared first.
  void take(Copies& out) noexcept;
  /// Those that were found late since the last call.
  [[nodiscard]] std::vector<LateCopy> take_late();
  /// Nobody copies any more: every copy in flight has failed.
  void stop() noexcept;

  [[nodiscard]] HostCounts counts() const noexcept;
  [[nodiscard]] const HostPool& host() const noexcept { return host_; }
  /// Beside the KV, for one host slot, and the table of copies.
  [[nodiscard]] std::size_t slot_bytes() const noexcept { return host_.bytes(); }
  /// For the integrity check: every block that a write-back pins, every block that a load without sequence may write.
  template <class Pinned, class Owned>
  void for_each_block(Pinned&& pinned, Owned&& owned) const {
    for (const Copy& copy : copies_) {
      if (std::holds_alternative<copy::Storing>(copy.state) || std::holds_alternative<copy::StoringLate>(copy.state)) {
        pinned(copy.block);
      } else if (std::holds_alternative<copy::Orphaned>(copy.state) ||
                 std::holds_alternative<copy::OrphanedLate>(copy.state)) {
        owned(copy.block);
      }
    }
  }
  /// Whether this load is one that `sequence` waits for, and writes (or wrote) `block`.
  [[nodiscard]] bool serves(CopyIndex index, SequenceIndex sequence, BlockId block) const noexcept;
  /// What is wrong with the tier's own books, or nothing. O(slots + copies).
  [[nodiscard]] std::optional<std::string> check() const;

 private:
  static constexpr CopyIndex none = -1;
  struct Copy {
    fsm::Slot<CopyFsm> state{std::in_place_type<copy::Vacant>};
    std::uint64_t id = 0;
    std::int64_t deadline_us = 0;
    CopyIndex previous = none;  // in the order of their deadlines, those in flight and not late
    CopyIndex next = none;
    BlockId block = no_block;
    HostSlotId slot = no_host_slot;
    SequenceIndex reader = no_sequence;
    bool load = false;
  };
  static_assert(sizeof(Copy) <= 64);
  Copy& at(CopyIndex index) noexcept { return copies_[static_cast<std::size_t>(index)]; }
  [[nodiscard]] const Copy& at(CopyIndex index) const noexcept { return copies_[static_cast<std::size_t>(index)]; }
  template <class Event>
  void send(CopyIndex index, Event&& event) noexcept;
  CopyIndex begin(BlockId block, HostSlotId slot, SequenceIndex reader, bool load, std::int64_t now_us) noexcept;
  void unlink(CopyIndex index) noexcept;
  void late(CopyIndex index) noexcept;
  void vacate(CopyIndex index) noexcept;
  [[nodiscard]] std::optional<std::string> check_counts() const;

  BlockPool& pool_;
  HostPool host_;
  std::int64_t deadline_after_us_;
  int stores_max_;
  int loads_max_;
  std::vector<Copy> copies_;
  std::vector<CopyIndex> vacant_;
  CopyIndex first_ = none;
  CopyIndex last_ = none;
  int stores_ = 0;      // write-backs in flight
  int loads_ = 0;       // loads whose copy or sequence has not come to an end
  int loads_late_ = 0;  // of these
  int orphans_ = 0;     // loads without a sequence, not late
  std::uint64_t serial_ = 0;
  Copies issued_;
  std::vector<LateCopy> late_copies_;
  HostCounts totals_;
};

}  // namespace tokenrelay::scheduler

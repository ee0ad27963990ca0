// The slots of host memory: which hash each holds, and which one gives way when another block needs the room. That is
// the one that was written, loaded or last left the device the longest time ago (LRU): the device's own evictor
// (evictor.hpp) has sorted by what is known of a block's kind before it comes to need its copy here.
//
//     if (auto slot = host.take(hash)) ...a write-back fills it...; host.keep(std::move(*slot));
//     host::Loan loan = host.lend(found.id); ...a load reads it...; host.give_back(std::move(loan), true);
//
// Every operation is O(1) and allocates nothing after construction. A slot costs 44 bytes beside its KV.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "tokenrelay/scheduler/host_slot.hpp"
#include "tokenrelay/scheduler/prefix_index.hpp"

namespace tokenrelay::scheduler {

class HostPool {
 public:
  explicit HostPool(int slots);
  HostPool(const HostPool&) = delete;
  HostPool& operator=(const HostPool&) = delete;

  struct Found {
    HostSlotId id = no_host_slot;
    bool readable = false;  // else a write-back fills it
  };
  [[nodiscard]] Found find(const Hash128& hash) const noexcept;
  /// A slot for the block of this hash, which the index must not know: an empty one, or the least recently used one
  /// that nobody reads. Empty when there is none.
  [[nodiscard]] std::optional<host::Filling> take(const Hash128& hash) noexcept;
  void keep(host::Filling&& slot) noexcept;
  void drop(host::Filling&& slot) noexcept;
  /// One more load reads a slot that `find` called readable.
  [[nodiscard]] host::Loan lend(HostSlotId id) noexcept;
  /// `believed`: what was read was right; else nobody finds the slot any more.
  void give_back(host::Loan&& loan, bool believed) noexcept;
  /// The device gave its copy of this block up: from here on it is used here.
  void touch(const Hash128& hash) noexcept;

  [[nodiscard]] int slots() const noexcept { return static_cast<int>(records_.size()); }
  [[nodiscard]] int used() const noexcept { return slots() - empty_.size; }
  [[nodiscard]] const host::Records& records() const noexcept { return records_; }
  [[nodiscard]] std::size_t bytes() const noexcept {
    return records_.capacity() * sizeof(host::Record) + index_.bytes();
  }
  /// What is wrong with the pool's own books, or nothing. O(slots).
  [[nodiscard]] std::optional<std::string> check() const;

 private:
  /// Doubly linked through Record::previous and next.
  struct List {
    HostSlotId head = no_host_slot;
    HostSlotId tail = no_host_slot;
    int size = 0;
  };
  host::Record& at(HostSlotId id) noexcept { return records_[static_cast<std::size_t>(id)]; }
  [[nodiscard]] const host::Record& at(HostSlotId id) const noexcept { return records_[static_cast<std::size_t>(id)]; }
  void push_back(List& list, HostSlotId id) noexcept;
  void unlink(List& list, HostSlotId id) noexcept;
  void forget(HostSlotId id) noexcept;
  void empty(host::Empty&& slot) noexcept;
  [[nodiscard]] std::optional<std::string> check_list(const List& list, host::Kind kind) const;

  host::Records records_;
  PrefixIndex index_;
  List empty_;
  List kept_;  // least recently used first
};

}  // namespace tokenrelay::scheduler

// Sequences that wait to be admitted: by priority class, fairly between the tenants of a class, first come first served
// within a tenant.
//
//     WaitingWalk walk(waiting, priority_class);
//     while ((index = walk.next()) != no_sequence) { ...admit it, so that it leaves; or... walk.blocked(); }
//
// Whoever had its turn before (it was preempted, or waited for a block of somebody else) goes before the other tenants,
// and behind those of its own that came earlier.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "tokenrelay/scheduler/flows.hpp"
#include "tokenrelay/scheduler/places.hpp"

namespace tokenrelay::scheduler {

class WaitingQueue {
 public:
  using Token = Place<WaitingQueue>;
  static constexpr int priority_min = -16;  // requests outside are clamped to the nearest class
  static constexpr int classes = FlowTable::classes;

  /// `overtakes_max`: admissions of other tenants of its class that a tenant waits for, at most.
  WaitingQueue(Links& links, const Ranks& ranks, int overtakes_max)
      : links_(links),
        ranks_(ranks),
        flows_(links.size(), std::min(4 * links.size(), idle_flows_max), overtakes_max),
        entries_(links.size()) {}
  static int class_of(int priority) noexcept { return std::clamp(priority - priority_min, 0, classes - 1); }

  /// A sequence of this tenant begins to live; it is held in its flow until `dismiss`.
  void welcome(SequenceIndex index, std::uint64_t tenant_key) noexcept {
    entry(index) = {flows_.hold(tenant_key, class_index(index)), false};
  }
  void dismiss(SequenceIndex index) noexcept { flows_.release(entry(index).flow); }
  /// Tokens were computed for it. `admitted`: it was picked, these are the tokens of its prompt, and it leaves next.
  void served(SequenceIndex index, double tokens, bool admitted) noexcept {
    // The turn of one that returns was counted when it was picked first: the clock is not its flow's any more.
    const bool picked = admitted && !entry(index).returned;
    picked ? flows_.admit(entry(index).flow, tokens) : flows_.serve(entry(index).flow, tokens);
  }

  /// A new one goes behind those of its tenant.
  [[nodiscard]] Token enter(SequenceIndex index) noexcept;
  /// One that had its turn before.
  [[nodiscard]] Token reenter(SequenceIndex index) noexcept;
  SequenceIndex leave(Token&& token) noexcept;

  [[nodiscard]] int size() const noexcept { return size_; }
  /// Counts what entered and left.
  [[nodiscard]] std::uint64_t version() const noexcept { return version_; }
  /// Bit c: somebody waits in class c.
  [[nodiscard]] std::uint32_t mask() const noexcept { return mask_; }
  /// What is wrong with the queue's own books, or nothing. O(sequences + flows).
  [[nodiscard]] std::optional<std::string> check() const;
  [[nodiscard]] FlowIndex flow_of(SequenceIndex index) const noexcept { return entry(index).flow; }
  [[nodiscard]] double served_of(SequenceIndex index) const noexcept { return flows_.at(entry(index).flow).served; }

 private:
  friend class WaitingWalk;
  static constexpr std::size_t idle_flows_max = 4096;  // tenants without sequences whose service is remembered
  struct Entry {
    FlowIndex flow = no_flow;
    bool returned = false;  // in `returned_`, and not in its flow
  };
  [[nodiscard]] int class_index(SequenceIndex index) const noexcept {
    return ranks_[static_cast<std::size_t>(index)].priority_class;
  }
  [[nodiscard]] std::uint64_t ticket(SequenceIndex index) const noexcept {
    return ranks_[static_cast<std::size_t>(index)].ticket;
  }
  [[nodiscard]] SequenceIndex after(SequenceIndex index) const noexcept {
    return links_[static_cast<std::size_t>(index)].next;
  }
  Entry& entry(SequenceIndex index) noexcept { return entries_[static_cast<std::size_t>(index)]; }
  [[nodiscard]] const Entry& entry(SequenceIndex index) const noexcept {
    return entries_[static_cast<std::size_t>(index)];
  }
  Token entered(SequenceIndex index) noexcept;
  /// Back into its class's heap, if somebody waits in it.
  void offer(FlowIndex flow) noexcept;

  Links& links_;
  const Ranks& ranks_;
  FlowTable flows_;
  std::vector<Entry> entries_;  // by sequence
  std::array<RankedList, classes> returned_{};
  std::array<int, classes> sizes_{};
  std::uint32_t mask_ = 0;
  int size_ = 0;
  std::uint64_t version_ = 0;
};

/// The candidates of one class, in the order in which they may be admitted. The queue changes meanwhile only in that a
/// candidate leaves it.
class WaitingWalk {
 public:
  WaitingWalk(WaitingQueue& queue, int priority_class) noexcept
      : queue_(queue),
        priority_class_(priority_class),
        returned_(queue.returned_[static_cast<std::size_t>(priority_class)].first()) {}
  WaitingWalk(const WaitingWalk&) = delete;
  WaitingWalk& operator=(const WaitingWalk&) = delete;
  ~WaitingWalk();

  /// The next one, or `no_sequence`. The one before has left the queue, or `blocked` was called.
  [[nodiscard]] SequenceIndex next() noexcept;
  /// The last one cannot be admitted now: other tenants are tried first, then those behind it.
  void blocked() noexcept;

  static constexpr std::size_t open_max = 8;  // flows with blocked requests, and the one at hand

 private:
  struct Open {
    FlowIndex flow;
    SequenceIndex at;  // its next candidate
    int blocked;
  };
  [[nodiscard]] std::size_t pick() noexcept;
  std::size_t open(FlowIndex flow) noexcept;

  WaitingQueue& queue_;
  int priority_class_;
  SequenceIndex returned_;
  std::array<Open, open_max> open_{};
  std::size_t open_size_ = 0;
  bool overdue_ = false;            // a flow was opened for the number of admissions that passed it
  std::size_t current_ = open_max;  // whose candidate was given last; `open_max`: one that had its turn before
};

}  // namespace tokenrelay::scheduler

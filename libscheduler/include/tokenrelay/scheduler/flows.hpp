// Flows: the requests of one tenant in one priority class, and what each flow was served, so that tenants get equal
// shares.
//
// Fair queueing over tokens (Goyal, Vin and Cheng, "Start-time fair queueing", 1996; Sheng et al., "Fairness in serving
// large language models", 2024): serving a flow adds the tokens to its counter, and the waiting flow with the smallest
// counter is next. A flow in which nobody waited begins at its class's clock, so that nobody saves up service. The
// clock stands at what the flow picked last had been served, and a part of what it is served now. A flow that was
// passed by too many admissions is next whatever it was served: tenants that come newly all the time pass nobody for
// ever. Picking, serving and leaving are O(log flows) or less.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "tokenrelay/scheduler/id_map.hpp"
#include "tokenrelay/scheduler/places.hpp"

namespace tokenrelay::scheduler {

using FlowIndex = std::int32_t;
inline constexpr FlowIndex no_flow = -1;

struct Flow {
  std::uint64_t key = 0;  // of its tenant and class
  double served = 0;      // tokens, as its class's clock counts them
  RankedList waiting;
  std::int32_t live = 0;      // sequences that hold it
  std::int32_t heap_at = -1;  // in its class's heap, while somebody waits and no walk has it
  std::int32_t priority_class = 0;
  std::uint64_t turn = 0;        // admissions of its class when it was picked last, or when it began to wait
  FlowIndex previous = no_flow;  // among its class's waiting flows by turn, or among those without sequences
  FlowIndex next = no_flow;
};

/// Doubly linked through the flows themselves; a flow is in one list at a time.
class FlowList {
 public:
  [[nodiscard]] FlowIndex first() const noexcept { return first_; }
  void append(std::vector<Flow>& flows, FlowIndex flow) noexcept;
  void remove(std::vector<Flow>& flows, FlowIndex flow) noexcept;

 private:
  FlowIndex first_ = no_flow;
  FlowIndex last_ = no_flow;
};

/// The waiting flows of one class, the least served first; ties by who came first.
class FlowHeap {
 public:
  struct Node {
    double served;  // as of when it was put here or last looked at: flows are only ever served more
    std::uint64_t ticket;
    FlowIndex flow;
  };

  void reserve(std::size_t flows) { nodes_.reserve(flows); }
  [[nodiscard]] bool empty() const noexcept { return nodes_.empty(); }
  void push(std::vector<Flow>& flows, const Node& node) noexcept;
  void remove(std::vector<Flow>& flows, FlowIndex flow) noexcept;
  /// The least served one, with its counter as it is now.
  [[nodiscard]] const Node& top(std::vector<Flow>& flows) noexcept;
  [[nodiscard]] const std::vector<Node>& nodes() const noexcept { return nodes_; }

 private:
  static bool before(const Node& a, const Node& b) noexcept {
    return a.served != b.served ? a.served < b.served : a.ticket < b.ticket;
  }
  void put(std::vector<Flow>& flows, std::size_t at, const Node& node) noexcept {
    nodes_[at] = node;
    flows[static_cast<std::size_t>(node.flow)].heap_at = static_cast<std::int32_t>(at);
  }
  void rise(std::vector<Flow>& flows, std::size_t at, const Node& node) noexcept;
  void sink(std::vector<Flow>& flows, std::size_t at, const Node& node) noexcept;

  std::vector<Node> nodes_;  // never grows past what was reserved
};

/// All flows. Those that have no sequence are kept as long as there is room: what they were served counts when they
/// come back.
class FlowTable {
 public:
  static constexpr int classes = 32;

  /// Room for one flow per sequence, and `idle_max` more.
  FlowTable(std::size_t sequences, std::size_t idle_max, int overtakes_max);

  /// The flow with this key, made if it is new; the caller's sequence holds it until `release`.
  [[nodiscard]] FlowIndex hold(std::uint64_t key, int priority_class) noexcept;
  void release(FlowIndex flow) noexcept;
  /// Tokens were computed for it.
  void serve(FlowIndex flow, double tokens) noexcept { at(flow).served += tokens; }
  /// It was picked, and a prompt with so many tokens to compute was admitted.
  void admit(FlowIndex flow, double tokens) noexcept;
  /// Its first request begins to wait, or its last one no longer does.
  void begins(FlowIndex flow) noexcept;
  void ceases(FlowIndex flow) noexcept;

  /// The flow of the class that waits for too many admissions of others, or `no_flow`.
  [[nodiscard]] FlowIndex overdue(int priority_class) const noexcept;

  [[nodiscard]] Flow& at(FlowIndex flow) noexcept { return flows_[static_cast<std::size_t>(flow)]; }
  [[nodiscard]] const Flow& at(FlowIndex flow) const noexcept { return flows_[static_cast<std::size_t>(flow)]; }
  [[nodiscard]] std::vector<Flow>& flows() noexcept { return flows_; }
  [[nodiscard]] FlowIndex size() const noexcept { return static_cast<FlowIndex>(flows_.size()); }
  [[nodiscard]] const FlowHeap& heap(int priority_class) const noexcept {
    return heaps_[static_cast<std::size_t>(priority_class)];
  }
  [[nodiscard]] FlowHeap& heap(int priority_class) noexcept { return heaps_[static_cast<std::size_t>(priority_class)]; }
  [[nodiscard]] int waiting(int priority_class) const noexcept {
    return clocks_[static_cast<std::size_t>(priority_class)].waiting;
  }

 private:
  struct Clock {
    double served = 0;  // where a flow begins
    int waiting = 0;    // flows in which somebody waits
    std::uint64_t admissions = 0;
    FlowList turns;  // those flows, the one picked longest ago first
  };
  [[nodiscard]] Clock& clock(FlowIndex flow) noexcept {
    return clocks_[static_cast<std::size_t>(at(flow).priority_class)];
  }
  void take_turn(FlowIndex flow) noexcept;

  std::vector<Flow> flows_;
  std::vector<FlowIndex> vacant_;
  IdMap by_key_;
  std::array<FlowHeap, classes> heaps_;
  std::array<Clock, classes> clocks_;
  FlowList idle_;  // without sequences, the longest first: they are forgotten when room is needed
  std::uint64_t overtakes_max_;
};

}  // namespace tokenrelay::scheduler

#include "tokenrelay/scheduler/flows.hpp"

namespace tokenrelay::scheduler {

void FlowHeap::rise(std::vector<Flow>& flows, std::size_t at, const Node& node) noexcept {
  while (at > 0 && before(node, nodes_[(at - 1) / 2])) {
    put(flows, at, nodes_[(at - 1) / 2]);
    at = (at - 1) / 2;
  }
  put(flows, at, node);
}

void FlowHeap::sink(std::vector<Flow>& flows, std::size_t at, const Node& node) noexcept {
  for (std::size_t child = 2 * at + 1; child < nodes_.size(); child = 2 * at + 1) {
    if (child + 1 < nodes_.size() && before(nodes_[child + 1], nodes_[child])) ++child;
    if (!before(nodes_[child], node)) break;
    put(flows, at, nodes_[child]);
    at = child;
  }
  put(flows, at, node);
}

void FlowHeap::push(std::vector<Flow>& flows, const Node& node) noexcept {
  nodes_.push_back(node);
  rise(flows, nodes_.size() - 1, node);
}

void FlowHeap::remove(std::vector<Flow>& flows, FlowIndex flow) noexcept {
  const auto at = static_cast<std::size_t>(flows[static_cast<std::size_t>(flow)].heap_at);
  TR_ASSERT(at < nodes_.size() && nodes_[at].flow == flow, "a flow was taken from a heap it is not in");
  const Node last = nodes_.back();
  nodes_.pop_back();
  flows[static_cast<std::size_t>(flow)].heap_at = -1;
  if (last.flow == flow) return;
  if (at > 0 && before(last, nodes_[(at - 1) / 2])) {
    rise(flows, at, last);
  } else {
    sink(flows, at, last);
  }
}

const FlowHeap::Node& FlowHeap::top(std::vector<Flow>& flows) noexcept {
  for (;;) {
    Node node = nodes_.front();
    const double served = flows[static_cast<std::size_t>(node.flow)].served;
    if (node.served == served) return nodes_.front();
    node.served = served;
    sink(flows, 0, node);
  }
}

void FlowList::append(std::vector<Flow>& flows, FlowIndex flow) noexcept {
  Flow& own = flows[static_cast<std::size_t>(flow)];
  own.previous = last_;
  own.next = no_flow;
  (last_ == no_flow ? first_ : flows[static_cast<std::size_t>(last_)].next) = flow;
  last_ = flow;
}

void FlowList::remove(std::vector<Flow>& flows, FlowIndex flow) noexcept {
  const Flow& own = flows[static_cast<std::size_t>(flow)];
  (own.previous == no_flow ? first_ : flows[static_cast<std::size_t>(own.previous)].next) = own.next;
  (own.next == no_flow ? last_ : flows[static_cast<std::size_t>(own.next)].previous) = own.previous;
}

FlowTable::FlowTable(std::size_t sequences, std::size_t idle_max, int overtakes_max)
    : flows_(sequences + idle_max),
      by_key_(sequences + idle_max),
      overtakes_max_(static_cast<std::uint64_t>(overtakes_max)) {
  vacant_.reserve(flows_.size());
  for (auto flow = static_cast<FlowIndex>(flows_.size()); flow-- > 0;) vacant_.push_back(flow);
  for (FlowHeap& heap : heaps_) heap.reserve(sequences);
}

FlowIndex FlowTable::hold(std::uint64_t key, int priority_class) noexcept {
  FlowIndex flow = by_key_.find(key);
  if (flow == IdMap::none) {
    if (vacant_.empty()) {
      flow = idle_.first();
      TR_ASSERT(flow != no_flow, "more flows than sequences");
      idle_.remove(flows_, flow);
      by_key_.erase(at(flow).key);
    } else {
      flow = vacant_.back();
      vacant_.pop_back();
    }
    at(flow) = Flow{};
    at(flow).key = key;
    at(flow).priority_class = priority_class;
    by_key_.set(key, flow);
  } else if (at(flow).live == 0) {
    idle_.remove(flows_, flow);
  }
  ++at(flow).live;
  return flow;
}

void FlowTable::release(FlowIndex flow) noexcept {
  Flow& released = at(flow);
  TR_ASSERT(released.live > 0, "a flow was released more often than held");
  if (--released.live > 0) return;
  TR_ASSERT(released.waiting.size() == 0, "a flow without sequences has waiting ones");
  idle_.append(flows_, flow);
}

void FlowTable::admit(FlowIndex flow, double tokens) noexcept {
  Flow& picked = at(flow);
  Clock& own = clock(flow);
  own.served = std::max(own.served, picked.served + tokens / (own.waiting + 1));
  picked.served += tokens;
  ++own.admissions;
  own.turns.remove(flows_, flow);
  take_turn(flow);
}

void FlowTable::take_turn(FlowIndex flow) noexcept {
  at(flow).turn = clock(flow).admissions;
  clock(flow).turns.append(flows_, flow);
}

void FlowTable::begins(FlowIndex flow) noexcept {
  Clock& own = clock(flow);
  at(flow).served = std::max(at(flow).served, own.served);
  ++own.waiting;
  take_turn(flow);
}

void FlowTable::ceases(FlowIndex flow) noexcept {
  --clock(flow).waiting;
  clock(flow).turns.remove(flows_, flow);
}

FlowIndex FlowTable::overdue(int priority_class) const noexcept {
  const Clock& own = clocks_[static_cast<std::size_t>(priority_class)];
  const FlowIndex first = own.turns.first();
  return first != no_flow && own.admissions - at(first).turn >= overtakes_max_ ? first : no_flow;
}

}  // namespace tokenrelay::scheduler

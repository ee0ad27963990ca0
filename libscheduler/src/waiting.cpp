#include "tokenrelay/scheduler/waiting.hpp"

namespace tokenrelay::scheduler {

WaitingQueue::Token WaitingQueue::entered(SequenceIndex index) noexcept {
  const auto priority_class = static_cast<std::size_t>(class_index(index));
  mask_ |= 1U << priority_class;
  ++sizes_[priority_class];
  ++size_;
  ++version_;
  return Token(index);
}

WaitingQueue::Token WaitingQueue::enter(SequenceIndex index) noexcept {
  entry(index).returned = false;
  Flow& flow = flows_.at(entry(index).flow);
  flow.waiting.insert_from_back(index, links_, ranks_);
  if (flow.waiting.size() == 1) {
    flows_.begins(entry(index).flow);
    offer(entry(index).flow);
  }
  return entered(index);
}

WaitingQueue::Token WaitingQueue::reenter(SequenceIndex index) noexcept {
  entry(index).returned = true;
  returned_[static_cast<std::size_t>(class_index(index))].insert_from_front(index, links_, ranks_);
  return entered(index);
}

SequenceIndex WaitingQueue::leave(Token&& token) noexcept {
  const SequenceIndex index = std::move(token).give_back();
  const auto priority_class = static_cast<std::size_t>(class_index(index));
  if (entry(index).returned) {
    returned_[priority_class].remove(index, links_);
  } else {
    Flow& flow = flows_.at(entry(index).flow);
    flow.waiting.remove(index, links_);
    if (flow.waiting.size() == 0) {
      flows_.ceases(entry(index).flow);
      if (flow.heap_at >= 0) flows_.heap(flow.priority_class).remove(flows_.flows(), entry(index).flow);
    }
  }
  if (--sizes_[priority_class] == 0) mask_ &= ~(1U << priority_class);
  --size_;
  ++version_;
  return index;
}

void WaitingQueue::offer(FlowIndex index) noexcept {
  const Flow& flow = flows_.at(index);
  if (flow.waiting.size() == 0) return;
  flows_.heap(flow.priority_class).push(flows_.flows(), {flow.served, ticket(flow.waiting.first()), index});
}

std::optional<std::string> WaitingQueue::check() const {
  std::array<int, classes> flows_waiting{};
  int waiting = 0;
  for (FlowIndex i = 0; i < flows_.size(); ++i) {
    const Flow& flow = flows_.at(i);
    const auto priority_class = static_cast<std::size_t>(flow.priority_class);
    waiting += flow.waiting.size();
    flows_waiting[priority_class] += flow.waiting.size() > 0;
    if ((flow.heap_at >= 0) != (flow.waiting.size() > 0)) return "a flow waits and is not offered, or the reverse";
    if (flow.waiting.size() > flow.live) return "a flow has more waiting sequences than sequences";
    if (flow.heap_at < 0) continue;
    const auto& nodes = flows_.heap(flow.priority_class).nodes();
    const auto at = static_cast<std::size_t>(flow.heap_at);
    if (at >= nodes.size() || nodes[at].flow != i) return "a flow is not where its heap says";
    if (nodes[at].served > flow.served) return "a flow was served less than its heap says";
    const auto& parent = nodes[(at - (at > 0)) / 2];
    if (parent.served > nodes[at].served) return "a heap is out of order";
  }
  for (std::size_t i = 0; i < classes; ++i) {
    waiting += returned_[i].size();
    if (flows_waiting[i] != flows_.waiting(static_cast<int>(i))) return "waiting flows are miscounted";
    if ((mask_ >> i & 1U) != (sizes_[i] > 0)) return "the mask of classes is wrong";
  }
  if (waiting != size_) return "the waiting queue's count is wrong";
  return std::nullopt;
}

WaitingWalk::~WaitingWalk() {
  for (std::size_t i = 0; i < open_size_; ++i) queue_.offer(open_[i].flow);
}

/// The open flow to take from: the one with the fewest blocked candidates, of those the least served one. A flow that
/// is not open has none blocked. `open_max`: there is none.
std::size_t WaitingWalk::pick() noexcept {
  const auto before = [this](const Open& a, const Open& b) {
    if (a.blocked != b.blocked) return a.blocked < b.blocked;
    const double served_a = queue_.flows_.at(a.flow).served;
    const double served_b = queue_.flows_.at(b.flow).served;
    return served_a != served_b ? served_a < served_b : queue_.ticket(a.at) < queue_.ticket(b.at);
  };
  const FlowIndex overdue = queue_.flows_.overdue(priority_class_);
  if (overdue != no_flow && !std::exchange(overdue_, true) && queue_.flows_.at(overdue).heap_at >= 0) {
    return open(overdue);
  }
  std::size_t best = open_max;
  for (std::size_t i = 0; i < open_size_; ++i) {
    if (open_[i].at != no_sequence && (best == open_max || before(open_[i], open_[best]))) best = i;
  }
  FlowHeap& heap = queue_.flows_.heap(priority_class_);
  if (heap.empty()) return best;
  const FlowHeap::Node& top = heap.top(queue_.flows_.flows());
  const Open other{top.flow, queue_.flows_.at(top.flow).waiting.first(), 0};
  if (best != open_max && !before(other, open_[best])) return best;
  if (best != open_max && open_[best].blocked == 0) {  // none of it is blocked: it need not stay open
    queue_.offer(open_[best].flow);
    open_[best] = open_[--open_size_];
  }
  return open_size_ == open_max ? open_max : open(other.flow);
}

std::size_t WaitingWalk::open(FlowIndex flow) noexcept {
  queue_.flows_.heap(priority_class_).remove(queue_.flows_.flows(), flow);
  TR_ASSERT(open_size_ < open_max, "a walk looks behind few blocked requests");
  open_[open_size_] = {flow, queue_.flows_.at(flow).waiting.first(), 0};
  return open_size_++;
}

SequenceIndex WaitingWalk::next() noexcept {
  const std::size_t flow = pick();
  if (returned_ != no_sequence) {
    const bool own_came_earlier = flow != open_max && open_[flow].flow == queue_.flow_of(returned_) &&
                                  queue_.ticket(open_[flow].at) < queue_.ticket(returned_);
    if (!own_came_earlier) {
      current_ = open_max;
      return std::exchange(returned_, queue_.after(returned_));
    }
  }
  current_ = flow;
  if (flow == open_max) return no_sequence;
  return std::exchange(open_[flow].at, queue_.after(open_[flow].at));
}

void WaitingWalk::blocked() noexcept {
  if (current_ != open_max) ++open_[current_].blocked;
}

}  // namespace tokenrelay::scheduler

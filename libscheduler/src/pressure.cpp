// When a decoding sequence finds no block: who gives his up.
#include <algorithm>

#include "send.hpp"

namespace tokenrelay::scheduler {

/// What it costs to compute again what it has computed, but for what it found in the cache and will find there again.
double Scheduler::recompute_us(SequenceIndex index) const noexcept {
  const Sequence& sequence = at(index);
  const int tokens = sequence.planned - sequence.reused;
  const double us = model_.prefill_us(sequence.reused, tokens);
  return us > 0 ? us : tokens;
}

/// Who gives his blocks up: of those in this part of the pool, of the lowest class, among those that were preempted
/// less than `preemptions_max` times, the one that is cheapest to compute again; of equal ones who came last. If all
/// were, who came last: the oldest then keeps what it has, so somebody always comes to an end.
SequenceIndex Scheduler::victim(int part) const noexcept {
  const auto class_of = [this](SequenceIndex index) {
    return index == no_sequence ? -1 : ranks_[static_cast<std::size_t>(index)].priority_class;
  };
  const int lowest = std::max(
      {class_of(last_of(decoding_, part)), class_of(last_of(prefilling_, part)), class_of(last_of(loading_, part))});
  struct Choice {
    bool spared;
    double cost;
    std::uint64_t ticket;
    SequenceIndex index;
  };
  Choice best{true, 0, 0, no_sequence};
  const auto consider = [&](const auto& list) {
    for (SequenceIndex index = last_of(list, part); class_of(index) == lowest; index = list.before(index)) {
      if (at(index).part != part) continue;
      const bool spared = at(index).preempted >= config_.preemptions_max;
      const Choice one{spared, spared ? 0 : recompute_us(index), ranks_[static_cast<std::size_t>(index)].ticket, index};
      const bool better = one.spared != best.spared ? !one.spared
                          : one.cost != best.cost   ? one.cost < best.cost
                                                    : one.ticket > best.ticket;
      if (best.index == no_sequence || better) best = one;
    }
  };
  consider(decoding_);
  consider(prefilling_);
  consider(loading_);
  return best.index;
}

/// Frees blocks for a decoding sequence by preempting another one, or itself. False: not now.
bool Scheduler::make_room(SequenceIndex for_index) noexcept {
  // A commit, or the end of a copy, will give blocks back; do not preempt more than needed.
  if (settling_ > 0 || tails_ > 0 || tier_.orphans_timely() > 0 || pool_.borrowed() > 0) return false;
  const SequenceIndex index = victim(at(for_index).part);
  preempt(index, for_index);
  Sequence& sequence = at(index);
  if (index == for_index) sequence.why = Why::preempted_self;
  sequence.preempted_why = sequence.why;
  sequence.preempted_for = at(for_index).id;
  return index != for_index;
}

/// A sequence that was preempted often takes the class of whoever preempts it: a better class presses on it no longer.
void Scheduler::preempt(SequenceIndex index, SequenceIndex for_index) noexcept {
  ++totals_.preemptions;
  Sequence& sequence = at(index);
  sequence.why = Why::preempted;
  const int own = ranks_[static_cast<std::size_t>(index)].priority_class;
  const int better = ranks_[static_cast<std::size_t>(for_index)].priority_class;
  sequence.climbs_to = ++sequence.preempted < config_.preemptions_max ? own : std::min(own, better);
  if (std::holds_alternative<request::Loading>(sequence.state)) {
    Rank& rank = ranks_[static_cast<std::size_t>(index)];
    rank.priority_class = std::min(rank.priority_class, sequence.climbs_to);
    preempt_load(index);
    return;
  }
  ++settling_;
  if (std::holds_alternative<request::Prefilling>(sequence.state)) prefilling_tokens_ -= sequence.text.size();
  send(sequence, request::Preempt{resources_});
  if (sequence.flights == 0) settle(index);
}

}  // namespace tokenrelay::scheduler

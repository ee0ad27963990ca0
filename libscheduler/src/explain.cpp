// Explaining: everything here runs only when somebody asks, and may look at everything.
#include "tokenrelay/scheduler/explain.hpp"

#include <algorithm>

#include "send.hpp"

namespace tokenrelay::scheduler {
namespace {

std::string number(std::uint64_t value) { return std::to_string(value); }
std::string number(int value) { return std::to_string(value); }
std::string times(int count) { return number(count) + (count == 1 ? " time" : " times"); }

/// What a waiting sequence waits for at this moment, and what was decided when it was looked at last.
std::string waits_for(const Explanation& e) {
  std::string text = "; " + (e.ahead == 0 ? std::string("next in line")
                                          : number(e.ahead) + (e.ahead == 1 ? " is" : " are") + " before it");
  if (e.priority != 0) text += " in class " + number(e.priority);
  if (e.slots_free == 0) text += "; no slot is free (" + number(e.slots) + " in use)";
  if (e.blocks_wanted > e.blocks_available) {
    text += "; wants " + number(e.blocks_wanted) + " blocks, " + number(std::max(0, e.blocks_available)) +
            " are free or cached";
    if (e.blocks_reserved > 0) text += " beyond " + number(e.blocks_reserved) + " kept for running ones";
  } else if (e.slots_free > 0 && e.why != Why::waits_blocks) {
    text += "; " + std::string(words_of(e.why));
    if (e.why == Why::waits_floor || e.why == Why::waits_time) {
      text += " of " + number(static_cast<int>(e.tps_in_force + 0.5)) + " tokens/s, " + number(e.users) + " run";
    }
  }
  if (e.tenant_ahead >= 1) {
    text += "; its tenant was served " + number(static_cast<std::uint64_t>(e.tenant_ahead)) +
            " tokens more than another that waits";
  }
  if (e.overtaken > 0) text += "; overtaken " + number(e.overtaken) + " of at most " + times(e.overtaken_max);
  return text;
}

std::string held(const Explanation& e) {
  std::string text = "; waits for block " + number(e.held_block) + ", which ";
  text += e.held_by == 0 ? "another sequence" : "sequence " + number(e.held_by);
  return text + " computes (" + number(e.holds) + " of at most " + times(e.holds_max) + ")";
}

std::string runs(const Explanation& e) {
  std::string text = "; slot " + number(e.slot) + ", " + number(e.computed_tokens) + " tokens computed or launched, " +
                     number(e.steps_in_flight) + " steps in flight";
  if (e.chunk_tokens > 0) text += "; last chunk " + number(e.chunk_tokens) + " tokens";
  if (e.drafted > 0) text += "; " + number(e.accepted) + " of " + number(e.drafted) + " drafted tokens came true";
  const std::string_view words = words_of(e.why);
  if (e.over || e.why == Why::none || e.why == Why::decodes) return text;
  // Why a chunk has its size belongs to the chunk, everything else stands for itself.
  constexpr std::string_view of_chunk = "its last chunk ";
  if (words.starts_with(of_chunk)) return text + " (" + std::string(words.substr(of_chunk.size())) + ")";
  return text + "; " + std::string(words);
}

}  // namespace

std::string words_of(const Explanation& e) {
  std::string text(e.state);
  text += ": prompt " + number(e.prompt_tokens) + " tokens";
  if (e.cached_tokens > 0) text += " (" + number(e.cached_tokens) + " cached)";
  text += ", output " + number(e.output_tokens) + " of " + number(e.output_tokens_max);
  if (e.expected_tokens > 0) text += " (" + number(e.expected_tokens) + " expected)";
  if (e.tps_floor > 0) text += ", asks for " + number(e.tps_floor) + " tokens/s";
  if (e.slot >= 0) {
    text += runs(e);
  } else if (e.held_block >= 0) {
    text += held(e);
  } else {
    text += waits_for(e);
  }
  if (e.preempted > 0) {
    text += "; preempted " + times(e.preempted) + ", last because ";
    text += e.preempted_why == Why::preempted_self ? "it found no block for its next token"
                                                   : "sequence " + number(e.preempted_for) + " needed its blocks";
  }
  return text;
}

/// How many wait and rank before a waiting sequence; and how much more than the least served tenant its own was served.
void Scheduler::explain_queue(SequenceIndex index, Explanation& out) const {
  const Rank& own = ranks_[static_cast<std::size_t>(index)];
  double least = waiting_.served_of(index);
  for (std::size_t i = 0; i < sequences_.size(); ++i) {
    const auto other = static_cast<SequenceIndex>(i);
    if (other == index || !std::holds_alternative<request::Waiting>(sequences_[i].state)) continue;
    out.ahead += ranks_[i] < own;
    if (ranks_[i].priority_class == own.priority_class) least = std::min(least, waiting_.served_of(other));
  }
  out.tenant_ahead = waiting_.served_of(index) - least;
}

/// The sequence in whose row of the block table a block stands that somebody computes.
std::uint64_t Scheduler::writer_of(BlockId id) const {
  for (const Sequence& s : sequences_) {
    if (s.slot < 0) continue;
    const auto row = static_cast<std::size_t>(s.slot) * static_cast<std::size_t>(table_width_);
    const auto begin = block_table_.begin() + static_cast<std::ptrdiff_t>(row);
    const int blocks = (s.text.size() + config_.block_tokens - 1) / config_.block_tokens;
    if (std::find(begin, begin + std::min(blocks, table_width_), id) != begin + std::min(blocks, table_width_)) {
      return s.id;
    }
  }
  return 0;
}

std::optional<Explanation> Scheduler::explanation(std::uint64_t sequence_id) const {
  const SequenceIndex index = ids_.find(sequence_id);
  if (index == IdMap::none) return std::nullopt;
  const Sequence& s = at(index);
  Explanation out;
  out.sequence_id = s.id;
  out.state = std::visit([]<class S>(const S&) { return S::name; }, s.state);
  out.why = s.why;
  out.prompt_tokens = s.output_start;
  out.output_tokens = s.text.size() - s.output_start;
  out.output_tokens_max = s.length_limit - s.output_start;
  out.cached_tokens = s.cached_tokens;
  out.reused_tokens = s.reused;
  out.computed_tokens = s.planned;
  out.priority = ranks_[static_cast<std::size_t>(index)].priority_class + WaitingQueue::priority_min;
  out.submitted_us = s.submitted_us;
  out.slots = config_.slots;
  out.slots_free = slots_.free();
  out.users = prefilling_.size() + decoding_.size();
  for (int part = 0; part < pool_.parts(); ++part) {  // the one with the most room
    if (part > 0 && room_in(part) <= out.blocks_available) continue;
    out.blocks_reserved = blocks_reserved(part);
    out.blocks_available = room_in(part);
  }
  out.overtaken = s.overtaken;
  out.overtaken_max = config_.overtakes_max;
  out.tps_in_force = floor_.in_force(s.tps_floor);
  out.tps_floor = s.tps_floor;
  out.expected_tokens = std::max(0, s.length_expected - s.output_start);
  out.holds = s.holds;
  out.holds_max = holds_max;
  out.slot = s.slot;
  out.steps_in_flight = s.flights;
  out.chunk_tokens = s.chunk;
  out.drafted = s.drafted;
  out.accepted = s.accepted;
  out.preempted = s.preempted;
  out.preempted_why = s.preempted_why;
  out.preempted_for = s.preempted_for;
  out.over = std::holds_alternative<request::Finishing>(s.state) || std::holds_alternative<request::Aborting>(s.state);
  if (std::holds_alternative<request::Waiting>(s.state)) {
    const int blocks = (s.text.size() + config_.block_tokens - 1) / config_.block_tokens;
    out.blocks_wanted = s.blocks_wanted > 0 ? s.blocks_wanted : blocks - std::max(0, s.matched) + growth_of(s);
    explain_queue(index, out);
  } else if (std::holds_alternative<request::Held>(s.state)) {
    out.held_block = holds_.block_of(index);
    out.held_by = writer_of(out.held_block);
  }
  return out;
}

std::string Scheduler::explain(std::uint64_t sequence_id) const {
  if (const auto explanation = this->explanation(sequence_id)) return words_of(*explanation);
  return ended_.find(sequence_id) == IdMap::none ? "unknown: never seen, or ended long ago" : "Ended";
}

}  // namespace tokenrelay::scheduler

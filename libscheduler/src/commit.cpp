// The second half of a step: what it sampled comes in, its blocks are sealed, and what only waited for it is given
// back.
#include <algorithm>

#include "send.hpp"

namespace tokenrelay::scheduler {

void Scheduler::commit(std::uint64_t step, std::span<const TokenId> token_ids, std::int64_t now_us, Outcome& out,
                       std::int64_t run_us) noexcept {
  out.clear();
  pool_.clock(now_us);
  TR_ASSERT(flights_size_ > 0, "nothing is launched");
  Flight& flight = flights_[flights_first_];
  TR_ASSERT(flight.step == step, "steps are committed in the order they were planned");
  TR_ASSERT(flight.sampled == token_ids.size(), "a step is committed with all tokens that it sampled");
  flights_first_ = (flights_first_ + 1) % flights_.size();
  --flights_size_;
  measure(flight, now_us, run_us);
  std::int32_t sampled = 0;
  for (const Row& row : flight.rows) {
    Sequence& sequence = at(row.index);
    --sequence.flights;
    if (row.tail) land_tail(row);
    if (row.draft) {
      const auto own = token_ids.subspan(static_cast<std::size_t>(sampled), static_cast<std::size_t>(row.length));
      commit_draft(row, own, sampled, now_us, out);
      sampled += row.length;
      if (sequence.flights == 0) settle(row.index);
      continue;
    }
    send(sequence, request::Land{resources_, sequence.text, row.start, row.length});
    totals_.hashed_blocks += sequence.text.take_hashed();
    seal_exports(sequence);
    if (row.samples) {
      take_token(row.index, token_ids[static_cast<std::size_t>(sampled)], sampled, now_us, out);
      ++sampled;
    }
    if (sequence.flights == 0) settle(row.index);
  }
  floor_.committed(model_, flight.shape);
  wake();
}

/// What the step took goes into the cost model. With two steps in flight a step begins when the one before has ended.
void Scheduler::measure(const Flight& flight, std::int64_t now_us, std::int64_t run_us) noexcept {
  const std::int64_t wall_us = now_us - std::max(flight.planned_us, committed_us_);
  committed_us_ = now_us;
  model_.observe(flight.shape, static_cast<double>(run_us == by_clock ? wall_us : run_us));
  if (run_us > 0) floor_.gap(static_cast<double>(wall_us - run_us));
  floor_.missed(static_cast<double>(wall_us) - flight.predicted_us);
}

void Scheduler::take_token(SequenceIndex index, TokenId token, std::int32_t row, std::int64_t now_us,
                           Outcome& out) noexcept {
  Sequence& sequence = at(index);
  const bool preempting = std::holds_alternative<request::Preempting>(sequence.state);
  const bool drafted = std::holds_alternative<request::Drafted>(sequence.state);
  if (!preempting && !drafted && !std::holds_alternative<request::Decoding>(sequence.state)) return;  // over: discarded
  sequence.text.append(token);
  if (drafted) follow(sequence, token);
  const auto& stops = sequence.stop_token_ids;
  Finish finish = Finish::none;
  if (std::binary_search(stops.begin(), stops.end(), token)) {
    finish = Finish::stop;
  } else if (sequence.text.size() == sequence.length_limit) {
    finish = Finish::length;
  } else if (sequence.handover == Handover::source) {
    finish = Finish::handover;
  }
  give(index, token, row, finish, sequence.length_planned - sequence.text.size(), now_us, out);
  if (finish == Finish::none) return;
  settling_ += preempting ? 0 : 1;
  if (finish == Finish::handover) {
    hand_over(sequence);
  } else {
    send(sequence, request::Finish{resources_, rest_of(sequence)});
  }
}

/// A token that was appended to its text goes out. `in_flight`: more of it that launched steps will sample.
void Scheduler::give(SequenceIndex index, TokenId token, std::int32_t row, Finish finish, int in_flight,
                     std::int64_t now_us, Outcome& out) noexcept {
  Sequence& sequence = at(index);
  ++totals_.output_tokens;
  waiting_.served(index, output_weight, false);
  if (floor_.on() && !std::holds_alternative<request::Preempting>(sequence.state)) {
    floor_.token(sequence.due_us, sequence.tps_floor, in_flight, now_us);
  }
  out.sequence_ids.push_back(sequence.id);
  out.token_ids.push_back(token);
  out.finish.push_back(static_cast<std::uint8_t>(finish));
  out.rows.push_back(row);
  out.first.push_back(!sequence.emitted);
  out.cached_tokens.push_back(sequence.cached_tokens);
  sequence.emitted = true;
}

/// For a sequence that no launched step holds: gives back what it kept, if it is over or preempted.
void Scheduler::settle(SequenceIndex index) noexcept {
  Sequence& sequence = at(index);
  if (std::holds_alternative<request::Preempting>(sequence.state)) {
    Rank& rank = ranks_[static_cast<std::size_t>(index)];
    rank.priority_class = std::min(rank.priority_class, sequence.climbs_to);
    expect_service(index);
  }
  pool_.releasing({sequence.origin, static_cast<std::size_t>(sequence.output_start / config_.block_tokens)});
  if (fsm::dispatch<RequestFsm>(sequence.state, request::Settle{resources_})) return;  // it runs on
  settling_ -= sequence.importing ? 0 : 1;
  sequence.importing = false;
  vacate(sequence);
  if (std::holds_alternative<request::Ended>(sequence.state)) {
    end(index);
  } else {
    sequence.planned = 0;
    sequence.length_planned = sequence.text.size();
  }
}

void Scheduler::end(SequenceIndex index) noexcept {
  Sequence& sequence = at(index);
  ids_.erase(sequence.id);
  waiting_.dismiss(index);
  std::uint64_t& remembered = ended_ids_[ended_next_];
  if (ended_size_ == ended_max) {
    // The same id may have ended again since: then the map points to its later place.
    if (ended_.find(remembered) == static_cast<std::int32_t>(ended_next_)) ended_.erase(remembered);
  } else {
    ++ended_size_;
  }
  remembered = sequence.id;
  ended_.set(sequence.id, static_cast<std::int32_t>(ended_next_));
  ended_next_ = (ended_next_ + 1) % ended_max;
  turns_.keep(sequence.id, ranks_[static_cast<std::size_t>(index)].ticket, std::move(sequence.text));
  sequence.text = HashedTokens();
  sequence.stop_token_ids = {};
  vacant_.push_back(index);
}

/// Those that waited for a block that was sealed or given up are back in the queue. True if there were any.
bool Scheduler::wake() noexcept {
  bool woke = false;
  for (const BlockId id : pool_.fired()) {
    for (SequenceIndex index = holds_.first(id); index != no_sequence; index = holds_.first(id)) {
      expect_service(index);
      at(index).why = Why::none;  // to be looked at anew
      send(at(index), request::Wake{resources_});
      woke = true;
    }
  }
  pool_.fired().clear();
  return woke;
}

/// Before a sequence enters the queue: a class that was empty starts to count the admissions of others.
void Scheduler::expect_service(SequenceIndex index) noexcept {
  const auto priority_class = static_cast<std::size_t>(ranks_[static_cast<std::size_t>(index)].priority_class);
  if ((waiting_.mask() >> priority_class & 1U) == 0) class_served_[priority_class] = admissions_;
}

}  // namespace tokenrelay::scheduler

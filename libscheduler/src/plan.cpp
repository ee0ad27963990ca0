// The first half of a step: decodes first, then running prefills, then admissions, all in the order of rank.
#include <algorithm>
#include <bit>
#include <utility>

#include "send.hpp"

namespace tokenrelay::scheduler {

bool Scheduler::plan(std::int64_t now_us, Plan& out) noexcept {
  pool_.clock(now_us);
  expire_copies(now_us);
  // What a draft gives decides on the next row of its sequence. The others wait with it: in steps of their own, the
  // weights would be read for each part.
  const std::size_t ahead = drafts_.leased() > 0 ? 1 : flights_.size();
  const bool planned = flights_size_ < ahead && plan_step(now_us, out);
  tier_.write_back(now_us);
  return planned;
}

bool Scheduler::plan_step(std::int64_t now_us, Plan& out) noexcept {
  Flight& flight = flights_[(flights_first_ + flights_size_) % flights_.size()];
  // A pass without rows may still have made room or woken somebody: then there is something for another pass.
  for (int pass = 0; pass < 3; ++pass) {
    out.clear();
    flight.rows.clear();
    flight.shape = {};
    const std::uint64_t preemptions = totals_.preemptions;
    plan_rows(now_us, out, flight);
    const bool woke = wake();
    if (!flight.rows.empty()) {
      launched(now_us, out, flight);
      return true;
    }
    if (!woke && preemptions == totals_.preemptions) return false;
  }
  return false;
}

void Scheduler::plan_rows(std::int64_t now_us, Plan& out, Flight& flight) noexcept {
  stalled_ = false;
  final_tokens_ = 0;
  floor_.begin(step_begins(now_us));
  plan_decodes(out, flight);
  Budget budget = floor_.budget(model_, flight.shape, config_.step_tokens - out.decodes - out.drafted);
  plan_prefills(budget, out, flight);
  if (!stalled_) admit_waiting(now_us, budget, out, flight);
}

/// When the launched steps will have ended, as far as one knows.
std::int64_t Scheduler::step_begins(std::int64_t now_us) const noexcept {
  std::int64_t begins = committed_us_;
  for (std::size_t i = 0; i < flights_size_; ++i) {
    const Flight& flight = flights_[(flights_first_ + i) % flights_.size()];
    begins = std::max(begins, flight.planned_us) + static_cast<std::int64_t>(flight.predicted_us + floor_.gap_us());
  }
  return std::max(begins, now_us);
}

void Scheduler::launched(std::int64_t now_us, Plan& out, Flight& flight) noexcept {
  out.step = flight.step = ++steps_;
  flight.sampled = static_cast<std::size_t>(out.sampled);
  flight.planned_us = now_us;
  out.predicted_us = flight.predicted_us = model_.predict_us(flight.shape);
  ++flights_size_;
  if (!floor_.on()) return;
  const StepShape decodes{.decode_rows = flight.shape.decode_rows, .decode_context = flight.shape.decode_context};
  floor_.planned(flight.predicted_us, flight.predicted_us - model_.predict_us(decodes), out.decodes > 0,
                 prefilling_.size() + loading_.size() + waiting_.size() > 0 || flight.shape.prefill_rows > 0);
}

/// In the order of rank. They come before admissions, so one of a low class goes on when those that run are through,
/// however many wait in better classes.
void Scheduler::plan_prefills(Budget& budget, Plan& out, Flight& flight) noexcept {
  SequenceIndex index = prefilling_.first();
  while (index != no_sequence && budget.open()) {
    const SequenceIndex next = prefilling_.after(index);  // the last chunk takes it out of this list
    plan_prefill(index, budget, out, flight);
    index = next;
  }
  if (index != no_sequence) at(index).why = budget.tokens > 0 ? Why::stays_floor : Why::stays_step;
}

void Scheduler::add_row(SequenceIndex index, int length, bool feedback, bool samples, Plan& out,
                        Flight& flight) noexcept {
  Sequence& sequence = at(index);
  out.sequence_ids.push_back(sequence.id);
  out.slots.push_back(sequence.slot);
  out.starts.push_back(sequence.planned);
  out.lengths.push_back(length);
  out.feedback.push_back(feedback);
  out.samples.push_back(samples);
  out.sampled += samples;
  flight.rows.push_back({index, sequence.planned, length, samples, false, false});
  sequence.planned += length;
  sequence.length_planned += samples;
  ++sequence.flights;
}

void Scheduler::plan_decodes(Plan& out, Flight& flight) noexcept {
  draft_room_ = drafts_.leased() > 0 ? draft_room() : 0;
  for (SequenceIndex index = decoding_.first(); index != no_sequence;) {
    if (!plan_decode(index, out, flight)) return;  // it preempted itself, and it was the last
    index = decoding_.after(index);
  }
}

/// False when the sequence left the list.
bool Scheduler::plan_decode(SequenceIndex index, Plan& out, Flight& flight) noexcept {
  Sequence& sequence = at(index);
  if (sequence.length_planned >= sequence.length_limit || sequence.handover == Handover::source) {
    sequence.why = Why::waits_own_end;
    return true;
  }
  const int width = drafts_.leased() > 0 ? draft_width(index) : 0;
  const int position = sequence.planned;
  std::optional<WritableBlock> room;
  if (position % config_.block_tokens == 0) {
    std::int32_t* row = &block_table_[static_cast<std::size_t>(sequence.slot) * static_cast<std::size_t>(table_width_)];
    const int at_block = position / config_.block_tokens;
    room = pool_.take(row[at_block - 1]);
    while (!room && make_room(index)) room = pool_.take(row[at_block - 1]);
    if (!room) {
      stalled_ = true;
      const bool waits = settling_ > 0 || tails_ > 0 || tier_.orphans_timely() > 0 || pool_.borrowed() > 0;
      if (waits && sequence.why != Why::preempted_self) sequence.why = Why::waits_room;
      return std::holds_alternative<request::Decoding>(sequence.state) ||
             std::holds_alternative<request::Drafted>(sequence.state);
    }
    row[at_block] = table_entry(*room);
  }
  decode_row(index, width, std::move(room), out, flight);
  return true;
}

/// A token, and `width` tokens of its draft if there is a block for them.
void Scheduler::decode_row(SequenceIndex index, int width, std::optional<WritableBlock> room, Plan& out,
                           Flight& flight) noexcept {
  Sequence& sequence = at(index);
  const int position = sequence.planned;
  const bool feedback = position >= sequence.text.size();
  out.token_ids.push_back(feedback ? 0 : sequence.text.tokens()[static_cast<std::size_t>(position)]);
  if (width > 0) width = reserve_drafted(sequence, width, room);
  if (width > 0) {
    const auto draft = drafts_.tokens(std::get<request::Drafted>(sequence.state).draft);
    out.token_ids.insert(out.token_ids.end(), draft.begin(), draft.begin() + width);
    out.drafted += width;
    out.sampled += width;
    draft_room_ -= width;
    send(sequence, request::Speculate{resources_, position, 1 + width, std::move(room)});
  } else {
    send(sequence, request::Launch{resources_, position, 1, std::move(room)});
  }
  if (sequence.arrived) announce(sequence, out);
  add_row(index, 1 + width, feedback, true, out, flight);
  flight.rows.back().draft = width > 0;
  for (int i = 0; i <= width; ++i) flight.shape.add_decode(position + i + 1);
  floor_.decode(sequence.due_us, sequence.tps_floor);
  if (sequence.growth > 0) expect_growth(sequence);
  sequence.why = Why::decodes;
  ++out.decodes;
}

/// How much of a prompt the next step computes, and what limits that. A length of 0: nothing now.
Scheduler::Chunk Scheduler::chunk_of(int start, int left, const Budget& budget) const noexcept {
  Chunk chunk{left, Why::chunk_rest};
  if (config_.chunk_tokens < chunk.length) chunk = {config_.chunk_tokens, Why::chunk_limit};
  if (budget.tokens < chunk.length) {
    chunk = {budget.tokens, budget.learning ? Why::chunk_learning : Why::chunk_step};
  }
  const int timely = model_.prefill_tokens_within(start, budget.us, chunk.length, budget.beside);
  if (timely >= chunk.length) return chunk;
  const int least = std::min(chunk.length, Floor::chunk_min);
  const Why why = budget.shared ? Why::chunk_share : Why::chunk_floor;
  if (timely >= least) return {timely > least ? timely - timely % Floor::chunk_min : timely, why};
  return budget.at_least ? Chunk{least, Why::chunk_share}
                         : Chunk{0, budget.tokens > 0 ? Why::stays_floor : Why::stays_step};
}

void Scheduler::plan_prefill(SequenceIndex index, Budget& budget, Plan& out, Flight& flight) noexcept {
  Sequence& sequence = at(index);
  const int start = sequence.planned;
  const int left = sequence.text.size() - start;
  const Chunk chunk = chunk_of(start, left, budget);
  const int length = chunk.length;
  sequence.why = chunk.why;
  sequence.chunk = length > 0 ? length : sequence.chunk;
  if (length == 0) {  // saved up for a chunk that is worth its while; later prompts do not take it away
    budget.us = 0;
    return;
  }
  const auto tokens = sequence.text.tokens().subspan(static_cast<std::size_t>(start), static_cast<std::size_t>(length));
  out.token_ids.insert(out.token_ids.end(), tokens.begin(), tokens.end());
  if (length == left) {
    prefilling_tokens_ -= sequence.text.size();
    final_tokens_ += sequence.text.size();
    send(sequence, request::LaunchFinal{resources_, start, length});
  } else {
    send(sequence, request::Launch{resources_, start, length, std::nullopt});
  }
  if (sequence.arrived) announce(sequence, out);
  add_row(index, length, false, length == left, out, flight);
  if (sequence.tail_tokens > 0) launch_tail(sequence, out, flight);
  flight.shape.add_prefill(start, length);
  budget.tokens -= length;
  budget.us -= model_.prefill_us(start, length, budget.beside);
  budget.beside += length;
  budget.at_least = false;
}

/// The class to admit from next: the best one, but for a class that waited for too many admissions of others.
int Scheduler::next_class(std::uint32_t mask, bool& overdue) const noexcept {
  const int best = std::countr_zero(mask);
  overdue = false;
  for (std::uint32_t rest = mask & (mask - 1); rest != 0; rest &= rest - 1) {
    const int other = std::countr_zero(rest);
    const std::uint64_t waited = admissions_ - class_served_[static_cast<std::size_t>(other)];
    if (waited >= static_cast<std::uint64_t>(config_.class_overtakes_max)) {
      overdue = true;
      return other;
    }
  }
  return best;
}

void Scheduler::admit_waiting(std::int64_t now_us, Budget& budget, Plan& out, Flight& flight) noexcept {
  const int running = prefilling_.size() + decoding_.size() + loading_.size();
  const Stuck now{pool_.available(), running, waiting_.version()};
  if (pool_.parts() == 1 && now.available <= stuck_.available && now.running >= stuck_.running &&
      now.version == stuck_.version)
    return;
  stuck_ = {};
  std::uint32_t exhausted = 0;  // classes whose first requests are blocked for now
  while (slots_.free() > 0) {
    const std::uint32_t mask = waiting_.mask() & ~exhausted;
    if (mask == 0) {
      if (waiting_.version() == now.version) stuck_ = now;
      return;
    }
    bool overdue = false;
    const int priority_class = next_class(mask, overdue);
    if (!admit_from(priority_class, overdue, now_us, budget, out, flight)) return;
    exhausted |= 1U << priority_class;
    if (overdue) exhausted = 0;  // it had its one turn; the better classes go on
  }
}

/// Admits what it can of one class. False: nobody else may be admitted in this step.
bool Scheduler::admit_from(int priority_class, bool overdue, std::int64_t now_us, Budget& budget, Plan& out,
                           Flight& flight) noexcept {
  std::array<SequenceIndex, lookahead> blocked{};
  std::size_t blocked_size = 0;
  WaitingWalk walk(waiting_, priority_class);
  while (slots_.free() > 0) {
    const SequenceIndex index = walk.next();
    if (index == no_sequence) return true;
    const Admission admission = admit(index, now_us, budget, out, flight);
    if (admission == Admission::paced) return false;
    if (admission == Admission::admitted) {
      bool enough = false;  // of being overtaken, for one of the blocked
      for (std::size_t i = 0; i < blocked_size; ++i) enough |= ++at(blocked[i]).overtaken >= config_.overtakes_max;
      ++admissions_;
      class_served_[static_cast<std::size_t>(priority_class)] = admissions_;
      if (enough) return false;
      if (overdue) return true;
    } else if (admission == Admission::blocked) {
      if (overdue || at(index).overtaken >= config_.overtakes_max) return false;
      blocked[blocked_size++] = index;
      if (blocked_size == blocked.size()) return true;
      walk.blocked();
    }
  }
  return true;
}

/// What keeps one more user out for the sake of those that run, if anything does.
Why Scheduler::floor_admits(const Sequence& sequence, const Flight& flight) const noexcept {
  if (sequence.length_limit - sequence.text.size() <= 1 || sequence.handover == Handover::source)
    return Why::none;  // it ends with its prompt, and never decodes
  const int rows = prefilling_.size() + decoding_.size() + loading_.size() + importing_ + 1;
  const int own = std::max(sequence.text.size(), sequence.length_expected);  // what it will read near its end
  const auto context = static_cast<double>(prefilling_tokens_ + final_tokens_ + own);
  return floor_.admits(model_, rows, flight.shape.decode_context + context, sequence.tps_floor);
}

Scheduler::Admission Scheduler::admit(SequenceIndex index, std::int64_t now_us, Budget& budget, Plan& out,
                                      Flight& flight) noexcept {
  Sequence& sequence = at(index);
  sequence.why = Why::waits_step;
  const bool imports = sequence.handover == Handover::destination;  // computes nothing
  if (!imports && budget.tokens <= 0) return Admission::paced;
  sequence.why = Why::waits_blocks;
  if (sequence.blocks_wanted > room()) return Admission::blocked;
  sequence.why = floor_admits(sequence, flight);
  // Past its age it goes before the floor: one at a time, so that the others still get what can be had.
  const bool overrides =
      sequence.why != Why::none && prefilling_.size() == 0 && floor_.overdue(sequence.submitted_us, now_us);
  if (sequence.why != Why::none && !overrides) return Admission::paced;
  budget.at_least |= overrides && !imports;
  if (!imports && sequence.matched >= 0 && !fits(sequence, budget)) return Admission::paced;
  Match found = match(sequence);
  if (found.promised != no_block && sequence.holds < holds_max) {
    ++sequence.holds;
    sequence.why = Why::waits_prefix;
    send(sequence, request::Hold{resources_, found.promised});
    return Admission::held;
  }
  const int blocks = (sequence.text.size() + config_.block_tokens - 1) / config_.block_tokens - found.blocks;
  sequence.blocks_wanted = blocks + found.unpinned + growth_of(sequence);
  if (sequence.blocks_wanted > room_in(found.part)) {
    sequence.why = Why::waits_blocks;
    return Admission::blocked;
  }
  sequence.matched = found.blocks;
  const int loads = loadable(sequence, found);
  if (loads < 0) {
    sequence.why = Why::waits_loads;
    return Admission::blocked;
  }
  if (loads > 0) {
    budget.at_least &= !overrides;
    reside_load(index, found, blocks, loads, now_us);
    return Admission::admitted;
  }
  if (imports) {
    reside_import(index, found, blocks);
    return Admission::admitted;
  }
  if (!fits(sequence, budget)) return Admission::paced;
  if (overrides) floor_.overridden();
  if (config_.tail_tokens_min > 0) match_tail(sequence, found, room_in(found.part) - sequence.blocks_wanted);
  reside(index, found, blocks, out);
  plan_prefill(index, budget, out, flight);
  return Admission::admitted;
}

/// Whether the step has time for a first chunk, going by what was found in the cache when one last looked.
bool Scheduler::fits(Sequence& sequence, const Budget& budget) const noexcept {
  const int start = sequence.matched * config_.block_tokens;
  if (chunk_of(start, sequence.text.size() - start, budget).length > 0) return true;
  sequence.why = Why::waits_time;
  return false;
}

/// A slot, pins on what the cache has of the prompt, and blocks for the rest of it. `launched_max`: of those that steps
/// (or a transfer) write at once.
request::Residence Scheduler::settle_in(SequenceIndex index, const Match& match, int blocks,
                                        std::size_t launched_max) noexcept {
  Sequence& sequence = at(index);
  const auto blocks_max =
      static_cast<std::size_t>((sequence.length_limit + config_.block_tokens - 1) / config_.block_tokens);
  request::Residence home{slots_.lease(), BlockChain(blocks_max, std::min(launched_max, blocks_max)), {}};
  sequence.slot = home.slot.slot();
  sequence.part = match.part;
  std::int32_t* row = &block_table_[static_cast<std::size_t>(sequence.slot) * static_cast<std::size_t>(table_width_)];
  for (int i = 0; i < match.blocks; ++i) {
    SealedPin pin = pool_.pin(found_[static_cast<std::size_t>(i)]);
    row[i] = table_entry(pin);
    home.chain.append(std::move(pin));
  }
  settle_tail(sequence, match, home);  // pinned before any block is taken, which may evict
  const int full = sequence.text.size() / config_.block_tokens;
  for (int i = match.blocks; i < match.blocks + blocks; ++i) {
    std::optional<WritableBlock> block = pool_.take(i == 0 ? no_block : row[i - 1], match.part);
    TR_ASSERT(block.has_value(), "admission counted blocks that are not there");
    row[i] = table_entry(*block);
    if (i < full) pool_.promise(*block, sequence.text.content(static_cast<std::size_t>(i)));
    home.chain.fill(std::move(*block));
  }
  home.chain.filled();
  sequence.planned = match.blocks * config_.block_tokens + sequence.tail_tokens;
  sequence.length_planned = sequence.text.size();
  sequence.reused = sequence.planned;
  sequence.overtaken = sequence.holds = sequence.blocks_wanted = 0;
  sequence.matched = -1;
  sequence.due_us = not_due;
  floor_.enter(sequence.tps_floor);
  expect_growth(sequence);
  return home;
}

/// Blocks that its output will take beyond those it has, as far as its request says how long that will be.
int Scheduler::growth_of(const Sequence& sequence) const noexcept {
  const auto blocks = [this](int tokens) { return (tokens + config_.block_tokens - 1) / config_.block_tokens; };
  return std::max(0, blocks(sequence.length_expected) - blocks(std::max(sequence.text.size(), sequence.planned)));
}

/// A resident sequence got blocks: what it is still expected to take is kept for it.
void Scheduler::expect_growth(Sequence& sequence) noexcept {
  const auto part = static_cast<std::size_t>(sequence.part);
  growth_[part] -= sequence.growth;
  sequence.growth = growth_of(sequence);
  growth_[part] += sequence.growth;
}

/// It has no slot any more, and nothing is kept for it.
void Scheduler::vacate(Sequence& sequence) noexcept {
  if (sequence.slot < 0) return;
  floor_.leave(sequence.tps_floor);
  growth_[static_cast<std::size_t>(sequence.part)] -= std::exchange(sequence.growth, 0);
  sequence.slot = -1;
}

/// The executor learns of a sequence with its first row.
void Scheduler::announce(Sequence& sequence, Plan& out) noexcept {
  sequence.arrived = false;
  out.admitted_ids.push_back(sequence.id);
  out.admitted_slots.push_back(sequence.slot);
  out.admitted_cached.push_back(sequence.planned);
  out.admitted_output_start.push_back(sequence.output_start);
}

/// Blocks that launched steps write of one sequence, at most.
std::size_t Scheduler::launched_max() const noexcept {
  return static_cast<std::size_t>(config_.steps_in_flight) *
         static_cast<std::size_t>(config_.chunk_tokens / config_.block_tokens + 2);
}

/// Its tenant was served its prompt; once, before it leaves the queue.
void Scheduler::charge(SequenceIndex index, int tokens) noexcept {
  if (!at(index).charged) waiting_.served(index, tokens, true);
  at(index).charged = true;
}

void Scheduler::first_admitted(Sequence& sequence) noexcept {
  if (sequence.cached_tokens >= 0) return;
  sequence.cached_tokens = std::min(sequence.planned, sequence.output_start);
  totals_.prompt_tokens += static_cast<std::uint64_t>(sequence.output_start);
  totals_.cached_tokens += static_cast<std::uint64_t>(sequence.cached_tokens);
  if (sequence.origin == Origin::prompt && 2 * sequence.cached_tokens >= sequence.output_start) {
    sequence.origin = Origin::turn;
  }
}

void Scheduler::reside(SequenceIndex index, const Match& match, int blocks, Plan& out) noexcept {
  Sequence& sequence = at(index);
  request::Residence home = settle_in(index, match, blocks, launched_max());
  charge(index, sequence.text.size() - sequence.planned);
  first_admitted(sequence);
  announce(sequence, out);
  prefilling_tokens_ += sequence.text.size();
  send(sequence, request::Admit{resources_, std::move(home)});
  seal_exports(sequence);
}

}  // namespace tokenrelay::scheduler

// Construction, the events from outside, and the views. plan.cpp and commit.cpp have the two halves of a step.
#include "tokenrelay/scheduler/scheduler.hpp"

#include <algorithm>

#include "send.hpp"

namespace tokenrelay::scheduler {
namespace {

constexpr std::size_t stop_tokens_max = 4096;  // of one request

std::size_t sequences_max(const Config& config) {
  return static_cast<std::size_t>(config.waiting_max) + static_cast<std::size_t>(config.slots);
}

/// Prompt and output that a request says it expects, within its limit; 0: it does not say, or the output is a peer's.
std::int32_t length_expected(const Submission& s, std::int64_t limit) {
  if (s.expected_tokens <= 0 || s.handover == Handover::source) return 0;
  return static_cast<std::int32_t>(std::min(limit, s.output_start + std::min(s.expected_tokens, limit)));
}

}  // namespace

Scheduler::Scheduler(const Config& config)
    : config_(config),
      key_(key_from_bytes(config.hash_key)),
      table_width_((config.context_tokens + config.block_tokens - 1) / config.block_tokens),
      block_table_(static_cast<std::size_t>(config.slots) * static_cast<std::size_t>(table_width_), 0),
      pool_(config.blocks, config.block_tokens, config.eviction, config.parts),
      slots_(config.slots),
      links_(sequences_max(config)),
      ranks_(sequences_max(config)),
      waiting_(links_, ranks_, config.class_overtakes_max),
      holds_(links_, sequences_max(config), static_cast<std::size_t>(config.blocks)),
      prefilling_(links_, ranks_),
      decoding_(links_, ranks_),
      loading_(links_, ranks_),
      // Loads of the two longest prompts: of those that are late, too, some room is left.
      tier_(pool_, config, 2 * static_cast<std::size_t>(table_width_)),
      drafts_(config.slots),
      resources_{pool_,     slots_,   waiting_, holds_,  prefilling_,
                 decoding_, loading_, tier_,    drafts_, config.block_tokens},
      sequences_(sequences_max(config)),
      ids_(sequences_max(config)),
      ended_(ended_max),
      ended_ids_(ended_max),
      turns_(turns_max, 4 * static_cast<std::size_t>(config.blocks) * static_cast<std::size_t>(config.block_tokens)),
      exports_(sequences_max(config)),
      flights_(static_cast<std::size_t>(config.steps_in_flight)),
      growth_(static_cast<std::size_t>(config.parts)),
      found_(static_cast<std::size_t>(table_width_)),
      floor_(config) {
  TR_ASSERT(!config.check(), "the configuration was not checked");
  vacant_.reserve(sequences_.size());
  reserved_.reserve(static_cast<std::size_t>(config.slots));
  for (auto index = static_cast<SequenceIndex>(sequences_.size()); index-- > 0;) vacant_.push_back(index);
  for (Flight& flight : flights_) flight.rows.reserve(static_cast<std::size_t>(config.slots));
}

Scheduler::~Scheduler() {
  // Linear handles cannot be dropped: the launched steps land, then everything is given back by the usual transitions.
  Outcome outcome;
  for (Sequence& sequence : sequences_) {
    if (!std::holds_alternative<request::Ended>(sequence.state)) abort(sequence.id, 0);
    if (sequence.importing) import_stopped(sequence.id, std::nullopt);  // who destroys it has stopped the transfers
  }
  while (flights_size_ > 0) {
    const std::vector<TokenId> discarded(expected()->tokens, 0);
    commit(expected()->step, discarded, 0, outcome);
  }
  exports_.lose_all(pool_);
  tier_.stop();  // likewise the copies
}

/// Where the text of a submission's parent is: in a sequence that runs, in a turn that ended, or at the beginning of
/// the turns that came after it. Nothing when it is gone, is shorter than what is asked for, or is another tenant's.
std::optional<Scheduler::Parent> Scheduler::find_parent(const Submission& s) noexcept {
  std::uint64_t id = *s.parent;
  std::uint64_t ticket = 0;  // 0: any
  auto length = static_cast<std::size_t>(config_.context_tokens);
  Parent parent;
  for (std::size_t hops = 0; parent.text == nullptr; ++hops) {
    if (const SequenceIndex live = ids_.find(id);
        live != IdMap::none && (ticket == 0 || ranks_[static_cast<std::size_t>(live)].ticket == ticket)) {
      parent.text = &at(live).text;
      break;
    }
    Turns::Turn* turn = turns_.find(id);
    if (turn == nullptr || hops > turns_max || (ticket != 0 && turn->ticket != ticket)) return std::nullopt;
    if (turn->heir_ticket == 0) {
      parent.text = &turn->text;
      parent.turn = turn;
    } else {
      length = std::min(length, turn->begins);
      id = turn->heir;
      ticket = turn->heir_ticket;
    }
  }
  length = std::min(length, static_cast<std::size_t>(parent.text->size()));
  parent.length = s.parent_tokens == Submission::all_tokens ? length : static_cast<std::size_t>(s.parent_tokens);
  if (s.parent_tokens < Submission::all_tokens || parent.length == 0 || parent.length > length) return std::nullopt;
  if (!(parent.text->root() == root_of(s.salt))) return std::nullopt;
  return parent;
}

/// The whole text of a submission, with room for `limit` tokens. What can fail comes before a text is handed on.
HashedTokens Scheduler::text_of(const Submission& s, const Parent& parent, std::size_t limit) {
  if (parent.text == nullptr) return {key_, root_of(s.salt), config_.block_tokens, s.token_ids, limit};
  HashedTokens text;
  if (parent.turn != nullptr) {
    parent.text->reserve(limit);
    text = turns_.hand_on(*parent.turn, parent.length, s.sequence_id, tickets_ + 1);
  } else {
    text = parent.text->beginning(parent.length, limit);
  }
  text.extend(s.token_ids);
  return text;
}

std::optional<RejectReason> Scheduler::refuse(const Submission& s, std::size_t inherited) const noexcept {
  const auto size = static_cast<std::int64_t>(inherited + s.token_ids.size());
  if (size >= config_.context_tokens) return RejectReason::prompt_too_long;  // one token at least must fit behind it
  const bool start_is_wrong = s.output_start < 1 || s.output_start > size;
  if (start_is_wrong || s.tokens_max <= size - s.output_start || s.stop_token_ids.size() > stop_tokens_max) {
    return RejectReason::invalid;
  }
  if (ids_.find(s.sequence_id) != IdMap::none) return RejectReason::duplicate_id;
  if (waiting_.size() + holds_.size() >= config_.waiting_max || vacant_.empty()) return RejectReason::queue_full;
  if (s.handover == Handover::source) {
    if (exports_.contains(s.sequence_id)) return RejectReason::duplicate_id;
    if (exports_.full()) return RejectReason::queue_full;
  }
  return std::nullopt;
}

Hash128 Scheduler::root_of(std::span<const std::uint8_t> salt) const {
  return root_hash(key_, config_.model_identity, salt);
}

/// Which flow it shares: its tenant's in its class. Keyed, so that nobody can make his tenant meet another's.
std::uint64_t Scheduler::tenant_key(const Submission& s) const {
  static constexpr std::string_view domain = "tokenrelay.tenant";
  const auto tenant = s.tenant.empty() ? s.salt : s.tenant;
  std::vector<std::uint8_t> text(domain.begin(), domain.end());
  text.push_back(s.tenant.empty() ? 0 : 1);
  text.push_back(static_cast<std::uint8_t>(WaitingQueue::class_of(s.priority)));
  text.insert(text.end(), tenant.begin(), tenant.end());
  return siphash128(key_, text).low;
}

/// Every full block of the prompt gets its hash: those that came with the parent have theirs; then from the block that
/// holds the same tokens after the same parent if it is the one that followed last, else computed.
void Scheduler::hash_prompt(HashedTokens& text) noexcept {
  const std::size_t full = static_cast<std::size_t>(text.size()) / static_cast<std::size_t>(config_.block_tokens);
  const std::size_t known = text.hashes();
  BlockId parent = known == 0 ? no_block : pool_.find(text.hash(known - 1)).id;
  for (std::size_t index = known; index < full; ++index) {
    const BlockId child = parent == no_block ? no_block : pool_.find_child(parent, text.block(index));
    if (child != no_block) text.adopt(pool_.records()[static_cast<std::size_t>(child)].hash);
    parent = child != no_block ? child : pool_.find(text.hash(index)).id;
  }
  totals_.hashed_blocks += text.take_hashed();
}

std::optional<RejectReason> Scheduler::submit(const Submission& s, std::int64_t now_us) {
  Parent parent;
  if (s.parent) {
    const auto found = find_parent(s);
    if (!found) return RejectReason::parent_unknown;
    parent = *found;
  }
  if (auto reason = refuse(s, parent.length)) return reason;
  // What can fail (memory) comes first; from the text on nothing can.
  const std::int64_t limit = std::min<std::int64_t>(s.output_start + s.tokens_max, config_.context_tokens);
  std::vector<TokenId> stops(s.stop_token_ids.begin(), s.stop_token_ids.end());
  std::sort(stops.begin(), stops.end());
  HashedTokens text = text_of(s, parent, static_cast<std::size_t>(limit));
  hash_prompt(text);
  if (s.handover == Handover::source) {
    const int blocks = (text.size() + config_.block_tokens - 1) / config_.block_tokens;
    exports_.reserve(s.sequence_id, static_cast<std::size_t>(blocks));
  }

  const SequenceIndex index = vacant_.back();
  vacant_.pop_back();
  Sequence& sequence = at(index);
  sequence.id = s.sequence_id;
  sequence.text = std::move(text);
  sequence.stop_token_ids = std::move(stops);
  sequence.output_start = s.output_start;
  sequence.length_limit = static_cast<std::int32_t>(limit);
  sequence.length_expected = length_expected(s, limit);
  sequence.tps_floor = s.handover == Handover::source ? 0 : FloorCensus::clamp(s.tps_floor);
  sequence.growth = 0;
  sequence.planned = 0;
  sequence.length_planned = sequence.text.size();
  sequence.slot = -1;
  sequence.part = 0;
  sequence.cached_tokens = -1;
  sequence.overtaken = sequence.holds = sequence.blocks_wanted = sequence.preempted = sequence.reused = 0;
  sequence.submitted_us = now_us;
  sequence.matched = -1;
  sequence.due_us = not_due;
  sequence.why = Why::none;
  sequence.chunk = sequence.drafted = sequence.accepted = 0;
  sequence.preempted_why = Why::none;
  sequence.emitted = false;
  sequence.handover = s.handover;
  sequence.importing = sequence.arrived = sequence.charged = false;
  sequence.loads = true;
  sequence.loading = 0;
  sequence.origin = s.tools ? Origin::tool_turn : s.parent ? Origin::turn : Origin::prompt;
  ranks_[static_cast<std::size_t>(index)] = {WaitingQueue::class_of(s.priority), ++tickets_};
  waiting_.welcome(index, tenant_key(s));
  expect_service(index);
  sequence.state.emplace<request::Waiting>(request::Waiting{waiting_.enter(index)});
  ids_.set(s.sequence_id, index);
  return std::nullopt;
}

AbortAnswer Scheduler::abort(std::uint64_t sequence_id, std::int64_t now_us) noexcept {
  pool_.clock(now_us);
  const SequenceIndex index = ids_.find(sequence_id);
  if (index == IdMap::none) {
    return ended_.find(sequence_id) == IdMap::none ? AbortAnswer::unknown : AbortAnswer::already_ended;
  }
  Sequence& sequence = at(index);
  const bool settling = std::holds_alternative<request::Preempting>(sequence.state) || sequence.importing;
  if (std::holds_alternative<request::Prefilling>(sequence.state)) prefilling_tokens_ -= sequence.text.size();
  pool_.releasing({sequence.origin, static_cast<std::size_t>(sequence.output_start / config_.block_tokens)});
  if (fsm::dispatch<RequestFsm>(sequence.state, request::Abort{resources_})) return AbortAnswer::already_ended;
  ++totals_.aborts;
  if (std::holds_alternative<request::Ended>(sequence.state)) {
    vacate(sequence);
    end(index);
  } else {
    settling_ += settling ? 0 : 1;
    if (sequence.flights == 0) settle(index);
  }
  wake();
  return AbortAnswer::aborted;
}

std::optional<Scheduler::Expected> Scheduler::expected() const noexcept {
  if (flights_size_ == 0) return std::nullopt;
  const Flight& flight = flights_[flights_first_];
  return Expected{flight.step, flight.sampled};
}

double Scheduler::bookkeeping_bytes_per_block() const noexcept {
  return static_cast<double>(pool_.bytes().bookkeeping + holds_.bytes()) / static_cast<double>(pool_.blocks());
}

Counts Scheduler::counts() const noexcept {
  Counts counts = totals_;
  counts.blocks_free = pool_.free();
  counts.blocks_cached = pool_.cached();
  counts.blocks_active = pool_.blocks() - pool_.available();
  const auto& records = pool_.records();
  counts.blocks_writable = records.count(block::Kind::writable);
  counts.blocks_in_flight = records.count(block::Kind::in_flight);
  counts.blocks_quarantined = records.count(block::Kind::quarantined);
  counts.blocks_sealed =
      counts.blocks_active - counts.blocks_writable - counts.blocks_in_flight - counts.blocks_quarantined;
  counts.sequences_waiting = waiting_.size() + holds_.size();
  counts.sequences_running = config_.slots - slots_.free();
  counts.steps_in_flight = static_cast<int>(flights_size_);
  counts.sequences_importing = importing_;
  counts.handles_open = exports_.size();
  counts.sequences_loading = loading_.size();
  counts.floor = floor_.counts();
  counts.host = tier_.counts();
  counts.host.loads = tier_prompts_;
  counts.host.tokens_loaded = tier_tokens_;
  counts.drafts.sequences = drafts_.leased();
  return counts;
}

std::optional<std::span<const TokenId>> Scheduler::token_ids(std::uint64_t sequence_id) const noexcept {
  const SequenceIndex index = ids_.find(sequence_id);
  if (index == IdMap::none) return std::nullopt;
  return at(index).text.tokens();
}

std::optional<Why> Scheduler::why(std::uint64_t sequence_id) const noexcept {
  const SequenceIndex index = ids_.find(sequence_id);
  if (index == IdMap::none) return std::nullopt;
  return at(index).why;
}

}  // namespace tokenrelay::scheduler

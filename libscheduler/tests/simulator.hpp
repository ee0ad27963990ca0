// A model of what runs the plans: a pretend transformer whose KV of a position is a fingerprint of all tokens up to it,
// kept in blocks as the real one is. A plan that reads a block with other content, too early or too late, gives other
// tokens than the sequence gives alone. Every plan and outcome is checked against what its sequence may do.
#pragma once

#include <algorithm>
#include <deque>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <vector>

#include "check.hpp"
#include "host_memory.hpp"
#include "request.hpp"
#include "tokenrelay/scheduler/scheduler.hpp"

namespace simulation {

using namespace tokenrelay::scheduler;

class Simulator {
 public:
  explicit Simulator(const Config& config) : scheduler(config), host(config), config_(config) {
    kv_.resize(static_cast<std::size_t>(config.blocks * config.block_tokens));
    sampled_.resize(static_cast<std::size_t>(config.slots));
  }

  std::optional<RejectReason> submit(Request request) {
    const auto reason = scheduler.submit({.sequence_id = request.id,
                                          .token_ids = std::span(request.tokens).subspan(request.inherited),
                                          .parent = request.parent,
                                          .parent_tokens = static_cast<std::int64_t>(request.inherited),
                                          .output_start = request.output_start,
                                          .tokens_max = request.tokens_max,
                                          .stop_token_ids = request.stops,
                                          .priority = request.priority,
                                          .salt = request.salt,
                                          .tenant = request.tenant,
                                          .handover = request.handover,
                                          .expected_tokens = request.expected,
                                          .tps_floor = request.floor},
                                         now_us);
    const auto* text = request.parent ? text_of(*request.parent) : nullptr;
    const bool exists = text != nullptr && text->salt == request.salt && request.inherited > 0 &&
                        request.inherited <= text->tokens.size();
    const bool unknown = reason == RejectReason::parent_unknown;
    if (!request.parent || (exists && live_.count(*request.parent) == 1)) CHECK(!unknown);
    if (request.parent && !exists) CHECK(unknown);  // a text that ended may be gone, but is never made up
    parents_known += request.parent && !reason;
    parents_unknown += unknown && exists;
    if (!reason) {
      if (request.handover == Handover::source) CHECK(handles_.insert({request.id, {}}).second);
      request.roll_out(config_.context_tokens);
      live_[request.id] = {std::move(request), 0, 0, 0, step_};
    }
    verify();
    return reason;
  }

  AbortAnswer abort(std::uint64_t id) {
    const AbortAnswer answer = scheduler.abort(id, now_us);
    CHECK_EQUAL(answer == AbortAnswer::aborted, live_.count(id) == 1);
    if (transfers_.count(id) == 1) transfers_.at(id).aborted = true;
    if (answer == AbortAnswer::aborted) end(id);
    verify();
    return answer;
  }

  /// False: nothing can run. With `late` the step runs at its commit, as on a device that lags behind.
  bool plan(bool late) {
    Plan plan;
    const bool planned = scheduler.plan(now_us++, plan);
    take_reserved();
    host.take(scheduler, kv_);
    CHECK(!planned || launched_.size() < static_cast<std::size_t>(config_.steps_in_flight));
    if (planned) {
      check_plan(plan);
      launched_.push_back({std::move(plan), {}, false});
      if (!late) execute_until(launched_.size());
    }
    verify();
    return planned;
  }

  /// Somebody guesses what comes next: `right` tokens that will come true, then as many as `wrong` that will not.
  DraftAnswer draft(std::uint64_t id, int right, int wrong) {
    const bool live = is_live(id);
    const std::vector<TokenId> tokens = guess(id, right, wrong);
    const DraftAnswer answer = scheduler.draft(id, tokens);
    if (config_.draft_tokens == 0) CHECK(answer == DraftAnswer::off);
    if (config_.draft_tokens > 0 && !live) CHECK(answer == DraftAnswer::unknown || answer == DraftAnswer::not_decoding);
    drafted += answer == DraftAnswer::drafted;
    verify();
    return answer;
  }

  bool commit(std::int64_t run_us = Scheduler::by_clock) {
    if (launched_.empty()) return false;
    execute_until(1);
    Launched launched = std::move(launched_.front());
    launched_.pop_front();
    expect_drafts(launched.plan);
    if (about_to_commit) about_to_commit(launched.sampled);
    Outcome outcome;
    scheduler.commit(launched.plan.step, launched.sampled, now_us++, outcome, run_us);
    check_outcome(launched, outcome);
    check_drafts(launched.plan, outcome);
    verify();
    return true;
  }

  /// A copy between device and host memory ends.
  void end_copy(std::uint64_t random, bool well) {
    host.end(scheduler, kv_, random, well);
    verify();
  }

  /// Runs until nothing is left; false when it stops making progress.
  bool drain() {
    for (int idle = 0; !live_.empty() || !launched_.empty() || !transfers_.empty() || host.in_flight() > 0;) {
      const bool planned = plan(false);
      const bool committed = commit();
      const bool moved = !transfers_.empty() || host.in_flight() > 0;
      if (!transfers_.empty()) end_transfer(transfers_.begin()->first, true, true);
      if (host.in_flight() > 0) end_copy(0, true);
      while (!handles_.empty()) end_handle(handles_.begin()->first);
      idle = planned || committed || moved ? 0 : idle + 1;
      if (idle > 2) return false;
    }
    while (!handles_.empty()) end_handle(handles_.begin()->first);
    verify();
    return true;
  }

  // KV that passes between workers.
  /// A transfer writes some more; into the blocks of a sequence that was aborted it writes what must harm nobody.
  void transfer_some(std::uint64_t random) {
    if (transfers_.empty()) return;
    auto& [id, transfer] = *std::next(transfers_.begin(), static_cast<std::ptrdiff_t>(random % transfers_.size()));
    for (int i = 0; i < 20 && transfer.written < transfer.kv.size(); ++i, ++transfer.written) write(transfer);
    if (transfer.aborted) transfer.written = 0;
  }
  /// It ends: well, or in vain, with the first token known or not.
  void end_transfer(std::uint64_t id, bool well, bool token) {
    Transfer& transfer = transfers_.at(id);
    while (well && transfer.written < transfer.kv.size()) {
      write(transfer);
      ++transfer.written;
    }
    const bool aborted = transfer.aborted;
    if (aborted) {
      CHECK(scheduler.import_stopped(id, std::nullopt) == ImportAnswer::done);
    } else {
      Live& live = live_.at(id);
      const TokenId first = live.request.outputs.front();
      const bool last = live.request.outputs.size() == 1;  // its source would not have handed it over
      if (well && !last) {
        CHECK(scheduler.imported(id, first) == ImportAnswer::done);
        ++imported;
      } else {
        const auto known = token && !last ? std::optional(first) : std::nullopt;
        CHECK(scheduler.import_stopped(id, known) == ImportAnswer::done);
        token = known.has_value();
        ++renounced;
      }
      live.emitted = (well && !last) || token ? 1 : 0;
    }
    transfers_.erase(id);
    CHECK(scheduler.import_stopped(id, std::nullopt) != ImportAnswer::done);
    verify();
  }
  /// One that waits for room is told to compute its prompt itself.
  void renounce_waiting(std::uint64_t id, bool token) {
    const auto found = live_.find(id);
    if (found == live_.end() || transfers_.count(id) == 1) return;
    Live& live = found->second;
    token = token && live.request.outputs.size() > 1;
    const auto first = token ? std::optional(live.request.outputs.front()) : std::nullopt;
    const bool waits = live.request.handover == Handover::destination && !live.arrived;
    CHECK_EQUAL(scheduler.import_stopped(id, first) == ImportAnswer::done, waits);
    if (waits) {
      live.arrived = true;
      live.emitted = token ? 1 : 0;
    }
    verify();
  }
  /// One event of a peer, or of the ledger: the table says what comes of it.
  void handle_event(std::uint64_t random, HandleEvent event) {
    if (handles_.empty()) return;
    const auto found = std::next(handles_.begin(), static_cast<std::ptrdiff_t>(random % handles_.size()));
    const std::uint64_t id = found->first;
    const std::string before(scheduler.handle_state(id));
    const auto refused = scheduler.handle(id, event);
    if (!refused && scheduler.handle_state(id).empty()) {
      CHECK(event == HandleEvent::release || event == HandleEvent::reclaim || event == HandleEvent::fence ||
            event == HandleEvent::lose);
      CHECK(event != HandleEvent::reclaim || before == "Reserved" || before == "Offered" || before == "Returned");
      handles_.erase(found);
      ++handles_ended;
    }
    verify();
  }
  [[nodiscard]] std::size_t transfers() const { return transfers_.size(); }
  [[nodiscard]] std::uint64_t some_transfer(std::uint64_t random) const {
    return std::next(transfers_.begin(), static_cast<std::ptrdiff_t>(random % transfers_.size()))->first;
  }

  void verify() {
    const auto broken = scheduler.check();
    if (broken) check::fail(__FILE__, __LINE__, *broken);
    const Counts counts = scheduler.counts();
    CHECK_EQUAL(counts.blocks_free + counts.blocks_cached + counts.blocks_active, config_.blocks);
    CHECK_EQUAL(counts.blocks_writable + counts.blocks_in_flight + counts.blocks_quarantined + counts.blocks_sealed,
                counts.blocks_active);
    CHECK_EQUAL(counts.sequences_importing, static_cast<int>(transfers_.size()));
    CHECK_EQUAL(counts.handles_open, static_cast<int>(handles_.size()));
    CHECK_EQUAL(counts.host.loads_in_flight + counts.host.write_backs_in_flight >= static_cast<int>(host.in_flight()),
                true);
    for (auto& [id, seen] : handles_) verify_handle(id, seen);
  }

  [[nodiscard]] std::size_t live() const { return live_.size(); }
  [[nodiscard]] bool busy() const { return !live_.empty() || !launched_.empty(); }
  [[nodiscard]] std::uint64_t some_live(std::uint64_t random) const {
    return std::next(live_.begin(), static_cast<std::ptrdiff_t>(random % live_.size()))->first;
  }
  /// What every live sequence does, for a failure's message.
  [[nodiscard]] std::string explain() const {
    std::string text;
    for (const auto& [id, live] : live_) text += std::to_string(id) + " " + scheduler.explain(id) + "\n";
    return text;
  }
  [[nodiscard]] std::vector<TokenId> guess(std::uint64_t id, int right, int wrong) const {
    std::vector<TokenId> tokens(static_cast<std::size_t>(right + wrong), Request::vocabulary);  // never sampled
    const auto found = live_.find(id);
    if (found == live_.end()) return tokens;
    const std::vector<TokenId>& outputs = found->second.request.outputs;
    const std::size_t known = found->second.emitted;
    const std::size_t count = std::min(static_cast<std::size_t>(right), outputs.size() - known);
    std::copy_n(outputs.begin() + static_cast<std::ptrdiff_t>(known), count, tokens.begin());
    return tokens;
  }
  [[nodiscard]] bool is_live(std::uint64_t id) const { return live_.count(id) == 1; }
  [[nodiscard]] std::uint64_t step() const { return step_; }
  [[nodiscard]] std::uint64_t digest() const { return digest_; }
  /// Steps between submission and end, at most, so far.
  [[nodiscard]] std::uint64_t longest() const { return longest_; }

  /// What the last sequence of this id held when it ended, or holds; nullptr when there was none.
  struct Text {
    std::vector<std::uint8_t> salt;
    std::vector<TokenId> tokens;
  };
  [[nodiscard]] const Text* text_of(std::uint64_t id) {
    if (live_.count(id) == 1) remember(id);
    const auto found = texts_.find(id);
    return found == texts_.end() ? nullptr : &found->second;
  }

  Scheduler scheduler;
  HostMemory host;
  std::int64_t now_us = 0;
  std::function<void(std::span<const TokenId>)> about_to_commit;  // for who writes a transcript
  std::uint64_t parents_known = 0;                                // submissions that were accepted with a parent
  std::uint64_t parents_unknown = 0;                              // whose text was gone
  std::uint64_t imported = 0;
  std::uint64_t renounced = 0;
  std::uint64_t handles_ended = 0;
  std::uint64_t handed_over = 0;
  std::uint64_t drafted = 0;           // drafts that were taken
  std::uint64_t drafts_kept = 0;       // rows whose draft came true as a whole
  std::uint64_t drafts_cut = 0;        // in part
  std::uint64_t drafts_refuted = 0;    // not at all
  std::uint64_t handles_complete = 0;  // of those: every block of the prompt could be read
  std::uint64_t tails_copied = 0;      // beginnings of blocks

 private:
  struct Transfer {
    std::vector<BlockId> blocks;    // where it writes
    std::vector<std::uint64_t> kv;  // what: of the tokens from the first of these blocks on
    std::size_t written = 0;
    bool aborted = false;
  };
  /// What a peer was told of a handle. None of it may change as long as the handle is there.
  struct Seen {
    std::vector<BlockId> blocks;
    std::vector<std::uint64_t> generations;
    std::vector<std::uint64_t> kv;  // expected, of the whole prompt
  };

  void take_reserved() {
    for (const Reserved& reserved : scheduler.take_reserved()) {
      Live& live = live_.at(reserved.sequence_id);
      CHECK_EQUAL(reserved.cached_tokens % config_.block_tokens, 0);
      const auto& kv = live.request.kv;
      const auto prompt = kv.begin() + static_cast<std::ptrdiff_t>(live.request.tokens.size());
      Transfer transfer{scheduler.import_blocks(reserved.sequence_id), {kv.begin() + reserved.cached_tokens, prompt}};
      const auto width = static_cast<std::size_t>(config_.block_tokens);
      CHECK_EQUAL(transfer.blocks.size(), (transfer.kv.size() + width - 1) / width);
      CHECK(transfers_.insert({reserved.sequence_id, std::move(transfer)}).second);
      live.arrived = true;
    }
  }
  void write(Transfer& transfer) {
    const auto width = static_cast<std::size_t>(config_.block_tokens);
    const auto block = static_cast<std::size_t>(transfer.blocks[transfer.written / width]);
    kv_[block * width + transfer.written % width] = transfer.aborted ? 0xdead : transfer.kv[transfer.written];
  }
  void end_handle(std::uint64_t id) {
    for (const HandleEvent event : {HandleEvent::reclaim, HandleEvent::release, HandleEvent::fence}) {
      if (!scheduler.handle(id, event)) break;
    }
    CHECK(scheduler.handle_state(id).empty());
    handles_.erase(id);
  }
  void verify_handle(std::uint64_t id, Seen& seen) {
    if (const auto found = live_.find(id); found != live_.end() && found->second.request.handover == Handover::source) {
      seen.kv.assign(
          found->second.request.kv.begin(),
          found->second.request.kv.begin() + static_cast<std::ptrdiff_t>(found->second.request.tokens.size()));
    }
    const std::vector<BlockId> now = scheduler.readable(id, 0);
    CHECK(now.size() >= seen.blocks.size());
    CHECK(std::equal(seen.blocks.begin(), seen.blocks.end(), now.begin()));
    for (std::size_t i = seen.blocks.size(); i < now.size(); ++i) {
      seen.generations.push_back(scheduler.generations()[static_cast<std::size_t>(now[i])]);
    }
    seen.blocks = now;
    const auto width = static_cast<std::size_t>(config_.block_tokens);
    for (std::size_t i = 0; i < now.size(); ++i) {
      CHECK_EQUAL(scheduler.generations()[static_cast<std::size_t>(now[i])], seen.generations[i]);
      for (std::size_t at = i * width; at < std::min((i + 1) * width, seen.kv.size()); ++at) {
        CHECK_EQUAL(kv_[static_cast<std::size_t>(now[i]) * width + at % width], seen.kv[at]);
      }
    }
  }

  void remember(std::uint64_t id) {
    const Live& live = live_.at(id);
    Text& text = texts_[id] = {live.request.salt, live.request.tokens};
    const auto& outputs = live.request.outputs;
    text.tokens.insert(text.tokens.end(), outputs.begin(), outputs.begin() + static_cast<std::ptrdiff_t>(live.emitted));
  }
  void end(std::uint64_t id) {
    remember(id);
    over_.insert(id);
    live_.erase(id);
  }

  struct Live {
    Request request;
    std::size_t emitted;  // outputs that were committed
    int planned;          // tokens computed or launched, since the last admission
    int in_flight;        // sampled rows that are launched
    std::uint64_t submitted_step;
    bool arrived = false;  // a destination that no longer waits for room
  };
  struct Launched {
    Plan plan;
    std::vector<TokenId> sampled;
    bool executed;
  };

  void check_plan(const Plan& plan) {
    ++step_;
    CHECK_EQUAL(plan.step, step_);
    CHECK(plan.token_ids.size() <= static_cast<std::size_t>(config_.step_tokens));
    std::set<std::uint64_t> seen;
    for (std::size_t i = 0; i < plan.admitted_ids.size(); ++i) {
      Live& live = live_.at(plan.admitted_ids[i]);
      live.planned = plan.admitted_cached[i];
      CHECK_EQUAL(live.in_flight, 0);
      CHECK_EQUAL(plan.admitted_output_start[i], live.request.output_start);
      digest_ = mix(digest_, plan.admitted_ids[i]);
    }
    std::size_t at = 0;
    int sampled = 0;
    int drafted_tokens = 0;
    for (std::size_t row = 0; row < plan.sequence_ids.size(); ++row) {
      const std::uint64_t id = plan.sequence_ids[row];
      CHECK(seen.insert(id).second);
      Live& live = live_.at(id);  // an aborted or ended sequence has no new rows
      const int known = static_cast<int>(live.request.tokens.size() + live.emitted);
      const int start = plan.starts[row];
      const int length = plan.lengths[row];
      const bool decodes = row < static_cast<std::size_t>(plan.decodes);
      CHECK_EQUAL(start, live.planned);
      CHECK(length >= 1 && length <= (decodes ? 1 + config_.draft_tokens : config_.chunk_tokens));
      const bool drafts = decodes && length > 1;
      if (drafts) {
        CHECK_EQUAL(start, known - 1);  // all before it is known, and no other step holds it
        CHECK_EQUAL(live.in_flight, 0);
        sampled += length - 1;
        drafted_tokens += length - 1;
      }
      CHECK_EQUAL(plan.feedback[row] == 1, start >= known);
      CHECK_EQUAL(plan.samples[row] == 1, decodes || start + length == known);
      CHECK(!decodes || start >= static_cast<int>(live.request.tokens.size()) || plan.samples[row] == 1);
      live.planned += length;
      live.in_flight += drafts ? length : plan.samples[row];
      sampled += plan.samples[row];
      const int limit = std::min(live.request.output_start + live.request.tokens_max, config_.context_tokens);
      CHECK(known + live.in_flight <= limit);  // no row past the length limit
      at += static_cast<std::size_t>(length);
      digest_ = mix(mix(mix(digest_, id), static_cast<std::uint64_t>(start)), static_cast<std::uint64_t>(length));
    }
    CHECK_EQUAL(at, plan.token_ids.size());
    CHECK_EQUAL(sampled, plan.sampled);
    CHECK_EQUAL(drafted_tokens, plan.drafted);
    if (drafted_tokens > 0) CHECK(launched_.empty());  // nothing is planned ahead of a draft
  }

  /// How many tokens each row with a draft must give: what came true of it and one more, one if it was preempted.
  void expect_drafts(const Plan& plan) {
    expected_.clear();
    std::size_t at = 0;
    for (std::size_t row = 0; row < static_cast<std::size_t>(plan.decodes); ++row) {
      const auto length = static_cast<std::size_t>(plan.lengths[row]);
      const auto found = live_.find(plan.sequence_ids[row]);
      if (length > 1 && found != live_.end()) {
        const Live& live = found->second;
        std::size_t& count = expected_[found->first];
        while (count + 1 < length && plan.token_ids[at + 1 + count] == live.request.outputs.at(live.emitted + count) &&
               live.emitted + count + 1 < live.request.outputs.size()) {
          ++count;
        }
        if (scheduler.explain(found->first).starts_with("Preempting")) count = 0;
        ++count;
        drafts_kept += count == length;
        drafts_refuted += count == 1;
        drafts_cut += count > 1 && count < length;
      }
      at += length;
    }
  }
  void check_drafts(const Plan& plan, const Outcome& outcome) {
    for (std::size_t row = 0; row < static_cast<std::size_t>(plan.decodes); ++row) {
      const std::uint64_t id = plan.sequence_ids[row];
      if (plan.lengths[row] == 1 || expected_.count(id) == 0) continue;
      const auto given =
          static_cast<std::size_t>(std::count(outcome.sequence_ids.begin(), outcome.sequence_ids.end(), id));
      CHECK_EQUAL(given, expected_.at(id));
      const auto found = live_.find(id);
      if (found == live_.end()) continue;
      found->second.planned = plan.starts[row] + static_cast<int>(given);
      found->second.in_flight = 0;
    }
  }

  void execute_until(std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) {
      if (!launched_[i].executed) execute(launched_[i]);
    }
  }

  [[nodiscard]] std::uint64_t& cell(int slot, int position) {
    const std::int32_t* row = scheduler.block_table() + slot * scheduler.table_width();
    return kv_[static_cast<std::size_t>(row[position / config_.block_tokens] * config_.block_tokens +
                                        position % config_.block_tokens)];
  }

  void execute(Launched& launched) {
    const Plan& plan = launched.plan;
    copy_tails(plan);
    std::size_t at = 0;
    for (std::size_t row = 0; row < plan.sequence_ids.size(); ++row) {
      const int slot = plan.slots[row];
      const int start = plan.starts[row];
      const auto found = live_.find(plan.sequence_ids[row]);  // not there: it ended meanwhile, and the row is discarded
      std::uint64_t last = root_of(plan.sequence_ids[row], found);
      for (int position = 0; position < start; ++position) {
        last = cell(slot, position);
        if (found != live_.end() && static_cast<std::size_t>(position) < found->second.request.kv.size()) {
          CHECK_EQUAL(last, found->second.request.kv[static_cast<std::size_t>(position)]);
        }
      }
      for (int i = 0; i < plan.lengths[row]; ++i, ++at) {
        const TokenId token = plan.feedback[row] ? sampled_[static_cast<std::size_t>(slot)] : plan.token_ids[at];
        cell(slot, start + i) = last = mix(last, token);
        const bool drafts = row < static_cast<std::size_t>(plan.decodes) && i + 1 < plan.lengths[row];
        if (drafts) launched.sampled.push_back(Request::sample(last));
      }
      if (plan.samples[row]) {
        sampled_[static_cast<std::size_t>(slot)] = Request::sample(last);
        launched.sampled.push_back(Request::sample(last));
      }
    }
    launched.executed = true;
  }

  /// Before any row: no two sequences write a block, and nobody writes one that is copied from.
  void copy_tails(const Plan& plan) {
    const auto width = static_cast<std::size_t>(config_.block_tokens);
    for (std::size_t i = 0; i < plan.tail_sources.size(); ++i) {
      CHECK(plan.tail_tokens[i] >= config_.tail_tokens_min && config_.tail_tokens_min > 0);
      CHECK(plan.tail_tokens[i] <= config_.block_tokens && plan.tail_sources[i] != plan.tail_blocks[i]);
      const auto from =
          kv_.begin() + static_cast<std::ptrdiff_t>(static_cast<std::size_t>(plan.tail_sources[i]) * width);
      const auto to = kv_.begin() + static_cast<std::ptrdiff_t>(static_cast<std::size_t>(plan.tail_blocks[i]) * width);
      std::copy_n(from, plan.tail_tokens[i], to);
      tails_copied += 1;
    }
  }

  std::uint64_t root_of(std::uint64_t, const std::map<std::uint64_t, Live>::iterator& found) {
    return found == live_.end() ? 0 : found->second.request.root();
  }

  void check_outcome(const Launched& launched, const Outcome& outcome) {
    for (std::size_t i = 0; i < outcome.sequence_ids.size(); ++i) {
      const std::uint64_t id = outcome.sequence_ids[i];
      const auto found = live_.find(id);
      CHECK(found != live_.end());  // nothing of an ended or aborted sequence is listed
      if (found == live_.end()) continue;
      Live& live = found->second;
      CHECK_EQUAL(outcome.token_ids[i], live.request.outputs.at(live.emitted));
      CHECK_EQUAL(outcome.token_ids[i], launched.sampled.at(static_cast<std::size_t>(outcome.rows[i])));
      CHECK_EQUAL(outcome.first[i] == 1, live.emitted == 0);
      ++live.emitted;
      --live.in_flight;
      const bool last = live.emitted == live.request.outputs.size();
      CHECK_EQUAL(static_cast<int>(outcome.finish[i]), static_cast<int>(last ? live.request.finish : Finish::none));
      digest_ = mix(mix(digest_, id), outcome.token_ids[i]);
      if (last) {
        if (live.request.finish == Finish::handover) {
          ++handed_over;
          const auto width = static_cast<std::size_t>(config_.block_tokens);
          const std::size_t blocks = (live.request.tokens.size() + width - 1) / width;
          const std::string_view state = scheduler.handle_state(id);
          if (state == "Reserved" || state == "Offered" || state == "Claimed" || state == "Transferring") {
            CHECK_EQUAL(scheduler.readable(id, 0).size(), blocks);
            ++handles_complete;
          }
        }
        longest_ = std::max(longest_, step_ - live.submitted_step);
        end(id);
      }
    }
  }

  Config config_;
  std::vector<std::uint64_t> kv_;
  std::vector<TokenId> sampled_;  // by slot: what it sampled last
  std::map<std::uint64_t, Live> live_;
  std::set<std::uint64_t> over_;
  std::map<std::uint64_t, Text> texts_;
  std::deque<Launched> launched_;
  std::map<std::uint64_t, std::size_t> expected_;  // tokens of rows with a draft, of the step being committed
  std::map<std::uint64_t, Transfer> transfers_;
  std::map<std::uint64_t, Seen> handles_;
  std::uint64_t step_ = 0;
  std::uint64_t digest_ = 0;
  std::uint64_t longest_ = 0;
};

}  // namespace simulation

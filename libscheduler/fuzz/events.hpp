// Bytes as events: any input is a configuration and a sequence of events for a scheduler in a small world, where
// prefixes repeat, pools are tight and every bound is met. The simulator checks all invariants after every event, and
// the KV that every step reads. An input can be written as a transcript (docs/transcripts.md), which a person reads and
// which `python -m tokenrelay.libscheduler.transcript` replays.
#pragma once

#include <array>
#include <cstdint>
#include <ostream>
#include <set>
#include <span>
#include <string>

#include "simulator.hpp"

namespace fuzz {

using namespace tokenrelay::scheduler;

/// Numbers from the input; zeros when it is used up.
class Input {
 public:
  explicit Input(std::span<const std::uint8_t> bytes) noexcept : bytes_(bytes) {}
  [[nodiscard]] bool empty() const noexcept { return at_ >= bytes_.size(); }
  int pick(int bound) noexcept { return bound <= 1 ? 0 : (bound <= 256 ? byte() : byte() * 256 + byte()) % bound; }
  bool one_in(int bound) noexcept { return pick(bound) == bound - 1; }  // seldom when the input is used up: never

 private:
  int byte() noexcept { return empty() ? 0 : bytes_[at_++]; }
  std::span<const std::uint8_t> bytes_;
  std::size_t at_ = 0;
};

/// What happened in all inputs together: events that never lead into a state prove nothing about it.
struct Seen {
  std::uint64_t inputs = 0;
  std::uint64_t events = 0;
  std::uint64_t preemptions = 0;
  std::uint64_t aborts = 0;
  std::uint64_t cached_tokens = 0;
  std::uint64_t output_tokens = 0;
  std::uint64_t evicted = 0;
  std::uint64_t parents = 0;
  std::uint64_t rejected = 0;
  std::uint64_t overrides = 0;
  std::uint64_t drafts_kept = 0;     // rows whose draft came true
  std::uint64_t drafts_cut = 0;      // in part
  std::uint64_t drafts_refuted = 0;  // not at all
  std::uint64_t stored = 0;          // blocks, in host memory
  std::uint64_t loaded = 0;
  std::uint64_t copies_failed = 0;
  std::uint64_t copies_late = 0;
  std::set<std::string> states;
  std::set<Why> whys;
};

inline Config config_of(Input& input) {
  Config config;
  config.block_tokens = 16;
  config.slots = 1 + input.pick(6);
  config.context_tokens = 40 + input.pick(140);
  const int blocks_min = (config.context_tokens + 15) / 16;
  config.blocks = blocks_min + input.pick(blocks_min * 2);
  config.step_tokens = config.slots + input.pick(100);
  config.chunk_tokens = 1 + input.pick(64);
  config.waiting_max = 1 + input.pick(12);
  config.steps_in_flight = 1 + input.pick(3);
  config.overtakes_max = input.pick(4);
  config.class_overtakes_max = 1 + input.pick(6);
  if (input.one_in(3)) {
    config.tps_floor = 10 * (1 + input.pick(20));
    config.tps_fraction = 0.25 * (1 + input.pick(4));
    config.prefill_share = 0.125 * input.pick(4);
    config.floor_wait_us = 20'000 * input.pick(4);
  }
  if (input.one_in(2)) {
    config.host_blocks = 1 + input.pick(config.blocks * 3);
    config.write_backs_max = 1 + input.pick(8);
    config.copy_deadline_us = 10'000 + 20'000 * input.pick(8);
  }
  // Of bytes that were read already: inputs from before there were drafts still mean what they meant.
  config.draft_tokens = (7 * config.chunk_tokens + config.waiting_max) % 16;
  for (std::size_t i = 0; i < config.hash_key.size(); ++i) config.hash_key[i] = static_cast<std::uint8_t>(i);
  return config;
}

class Player {
 public:
  Player(Input input, Seen& seen, std::ostream* transcript)
      : input_(input), config_(config_of(input_)), world_(config_), seen_(seen), out_(transcript) {
    hands_over_ = input_.one_in(3);
    if (out_ != nullptr) write_config();
    world_.about_to_commit = [this](std::span<const TokenId> tokens) {
      if (out_ == nullptr) return;
      *out_ << "commit";
      for (const TokenId token : tokens) *out_ << " " << token;
    };
  }

  /// False: an invariant broke, and was reported.
  bool play(int events_max) {
    ++seen_.inputs;
    for (int i = 0; i < events_max && !input_.empty() && check::failures() == 0; ++i) {
      ++seen_.events;
      event();
      look();
    }
    if (check::failures() == 0) drain();
    const Counts counts = world_.scheduler.counts();
    seen_.preemptions += counts.preemptions;
    seen_.aborts += counts.aborts;
    seen_.cached_tokens += counts.cached_tokens;
    seen_.output_tokens += counts.output_tokens;
    seen_.overrides += counts.floor.overrides;
    seen_.parents += world_.parents_known;
    seen_.drafts_kept += world_.drafts_kept;
    seen_.drafts_cut += world_.drafts_cut;
    seen_.drafts_refuted += world_.drafts_refuted;
    seen_.stored += counts.host.blocks_stored;
    seen_.loaded += counts.host.blocks_loaded;
    seen_.copies_failed += counts.host.copies_failed;
    seen_.copies_late += counts.host.copies_expired;
    for (const CacheEvent& e : world_.scheduler.take_cache_events())
      seen_.evicted += e.kind == CacheEvent::Kind::evicted;
    return check::failures() == 0;
  }

 private:
  void event() {
    const int what = input_.pick(16);
    if (what < 3) {
      submit(fresh());
    } else if (what == 3) {
      next_turn();
    } else if (what == 4 && world_.live() > 0) {
      abort(world_.some_live(static_cast<std::uint64_t>(input_.pick(256))));
    } else if (what == 5) {
      abort(1 + static_cast<std::uint64_t>(input_.pick(static_cast<int>(next_id_) + 1)));
    } else if (what == 6 && hands_over_) {
      hand_over();
    } else if (what == 7 && world_.host.in_flight() > 0) {
      end_copy(static_cast<std::uint64_t>(input_.pick(256)), !input_.one_in(4));
    } else if ((what == 6 || what == 7) && world_.live() > 0) {
      draft();
    } else if (what < 11) {
      line("plan");
      world_.plan(input_.one_in(2));
    } else if (what < 15) {
      commit();
    } else {
      wait(std::int64_t{250} << input_.pick(9));
    }
  }

  void submit(const simulation::Request& request, const std::string& prompt) {
    if (out_ != nullptr) {
      *out_ << "submit " << request.id << " " << prompt << " max=" << request.tokens_max
            << " output_start=" << request.output_start;
      if (!request.stops.empty()) *out_ << " stop=" << request.stops[0] << "," << request.stops[1];
      if (request.priority != 0) *out_ << " priority=" << request.priority;
      if (request.expected != 0) *out_ << " expected=" << request.expected;
      if (request.floor != 0) *out_ << " floor=" << request.floor;
      if (!request.salt.empty()) *out_ << " salt=" << static_cast<char>(request.salt[0]);
      if (!request.tenant.empty()) *out_ << " tenant=" << static_cast<char>(request.tenant[0]);
      if (request.parent) *out_ << " parent=" << *request.parent << " parent_tokens=" << request.inherited;
      *out_ << std::endl;  // flushed: the event may be the one that ends the process
    }
    seen_.rejected += world_.submit(request).has_value();
  }

  /// A beginning of one of three texts, then tokens of one's own.
  struct Fresh {
    simulation::Request request;
    std::string prompt;
  };
  void submit(const Fresh& fresh) { submit(fresh.request, fresh.prompt); }
  Fresh fresh() {
    Fresh out;
    simulation::Request& request = out.request;
    request.id =
        input_.one_in(16) ? 1 + static_cast<std::uint64_t>(input_.pick(static_cast<int>(next_id_))) : next_id_++;
    append(out, static_cast<char>('A' + input_.pick(3)), input_.pick(config_.context_tokens));
    append(out, static_cast<char>('D' + next_id_ % 22), 1 + input_.pick(20));
    describe(request);
    return out;
  }
  static void append(Fresh& out, char text, int count) {
    if (count == 0) return;
    for (int i = 0; i < count; ++i)
      out.request.tokens.push_back(10'000 * static_cast<TokenId>(text) + static_cast<TokenId>(i));
    if (!out.prompt.empty()) out.prompt += '+';  // piece by piece: GCC 12 warns wrongly of a literal plus a string
    out.prompt += text;
    out.prompt += std::to_string(count);
  }
  /// Everything of a request but its tokens.
  void describe(simulation::Request& request) {
    const int size = static_cast<int>(request.tokens.size());
    request.output_start = input_.one_in(6) ? 1 + input_.pick(size) : size;
    request.tokens_max = size - request.output_start + input_.pick(40);
    if (input_.one_in(2))
      request.stops = {static_cast<TokenId>(input_.pick(64)), static_cast<TokenId>(input_.pick(64))};
    if (input_.one_in(3)) request.priority = input_.pick(5) - 2;
    if (input_.one_in(3)) request.expected = input_.pick(60);
    if (input_.one_in(3)) request.floor = input_.pick(300);
    if (input_.one_in(4)) request.tenant = {static_cast<std::uint8_t>('a' + input_.pick(3))};
    if (hands_over_) request.handover = static_cast<Handover>(input_.pick(3));
    if (input_.one_in(6)) request.salt = {static_cast<std::uint8_t>('x' + input_.pick(2))};
  }

  /// A turn that names its parent, seldom one that does not fit it.
  void next_turn() {
    const auto parent = 1 + static_cast<std::uint64_t>(input_.pick(static_cast<int>(next_id_)));
    const auto* text = world_.text_of(parent);
    if (text == nullptr) return;
    Fresh out;
    out.request.id = next_id_++;
    out.request.inherited = input_.one_in(3)
                                ? static_cast<std::size_t>(input_.pick(static_cast<int>(text->tokens.size()) + 2))
                                : text->tokens.size();
    out.request.tokens.assign(
        text->tokens.begin(),
        text->tokens.begin() + static_cast<std::ptrdiff_t>(std::min(out.request.inherited, text->tokens.size())));
    out.request.tokens.resize(out.request.inherited);
    const auto salt = text->salt;
    append(out, static_cast<char>('D' + next_id_ % 22), 1 + input_.pick(20));
    describe(out.request);
    if (!input_.one_in(8)) out.request.salt = salt;
    out.request.parent = parent;
    submit(out);
  }

  void abort(std::uint64_t id) {
    line("abort " + std::to_string(id));
    world_.abort(id);
  }

  /// Transfers between workers and what becomes of them; a transcript has no words for these yet.
  void hand_over() {
    const auto number = static_cast<std::uint64_t>(input_.pick(256));
    const int what = input_.pick(4);
    line("# handover event " + std::to_string(what) + " " + std::to_string(number));
    if (what == 0) {
      world_.transfer_some(number);
    } else if (what == 1 && world_.transfers() > 0) {
      world_.end_transfer(world_.some_transfer(number), !input_.one_in(3), input_.one_in(2));
    } else if (what == 2) {
      world_.handle_event(number, static_cast<HandleEvent>(input_.pick(12)));
    } else if (what == 3 && world_.live() > 0) {
      world_.renounce_waiting(world_.some_live(number), input_.one_in(2));
    }
  }

  /// What comes next in some sequence, or what does not, or first the one and then the other.
  void draft() {
    const std::uint64_t id = world_.some_live(static_cast<std::uint64_t>(input_.pick(256)));
    const int right = input_.pick(20);
    const int wrong = input_.pick(6);
    if (out_ != nullptr) {
      *out_ << "draft " << id;
      for (const TokenId token : world_.guess(id, right, wrong)) *out_ << " " << token;
      *out_ << std::endl;
    }
    world_.draft(id, right, wrong);
  }

  void end_copy(std::uint64_t which, bool well) {
    which %= world_.host.in_flight();
    line((well ? "copied " : "copy_failed ") + std::to_string(world_.host.number_of(which)));
    world_.end_copy(which, well);
  }

  void commit() {
    const std::int64_t run_us = input_.one_in(4) ? 100 * input_.pick(200) : Scheduler::by_clock;
    if (!world_.commit(run_us) || out_ == nullptr) return;
    if (run_us >= 0) *out_ << " run=" << run_us << "us";
    *out_ << std::endl;
  }

  void wait(std::int64_t us) {
    line("wait " + std::to_string(us) + "us");
    world_.now_us += us;
  }

  /// Everybody comes to an end, and then nothing is held: no request is lost, no block leaks.
  void drain() {
    for (int idle = 0; (world_.busy() || world_.host.in_flight() > 0) && check::failures() == 0;) {
      line("plan");
      const bool planned = world_.plan(false);
      const bool committed = world_.commit();
      if (committed && out_ != nullptr) *out_ << std::endl;
      wait(5'000);
      const bool moves = world_.transfers() > 0 || world_.host.in_flight() > 0;
      if (world_.host.in_flight() > 0) end_copy(0, true);
      if (world_.transfers() > 0) world_.end_transfer(world_.some_transfer(0), true, true);
      idle = planned || committed || moves ? 0 : idle + 1;
      if (idle == 20 && hands_over_) CHECK(world_.drain());  // what handles hold is given back by whoever reads it
      if (idle > 100) check::fail(__FILE__, __LINE__, "no progress:\n" + world_.explain());
    }
    if (hands_over_) CHECK(world_.drain());
    const Counts counts = world_.scheduler.counts();
    CHECK_EQUAL(counts.blocks_active, 0);
    CHECK_EQUAL(counts.sequences_running + counts.sequences_waiting + counts.steps_in_flight, 0);
  }

  void look() {
    if (world_.live() == 0) return;
    const std::uint64_t id = world_.some_live(seen_.events);
    const std::string said = world_.scheduler.explain(id);
    seen_.states.insert(said.substr(0, said.find(':')));
    seen_.whys.insert(*world_.scheduler.why(id));
  }

  void line(const std::string& text) {
    if (out_ != nullptr) *out_ << text << std::endl;
  }
  void write_config() {
    *out_ << "An input of the fuzzer.\n\nconfig blocks=" << config_.blocks << " slots=" << config_.slots
          << " context_tokens=" << config_.context_tokens << " step_tokens=" << config_.step_tokens
          << " chunk_tokens=" << config_.chunk_tokens << " waiting_max=" << config_.waiting_max
          << " steps_in_flight=" << config_.steps_in_flight << " overtakes_max=" << config_.overtakes_max
          << " class_overtakes_max=" << config_.class_overtakes_max << " draft_tokens=" << config_.draft_tokens;
    if (config_.host_blocks > 0) {
      *out_ << " host_blocks=" << config_.host_blocks << " write_backs_max=" << config_.write_backs_max
            << " copy_deadline_us=" << config_.copy_deadline_us;
    }
    if (config_.tps_floor > 0) {
      *out_ << std::fixed << " tps_floor=" << config_.tps_floor << " tps_fraction=" << config_.tps_fraction
            << " prefill_share=" << config_.prefill_share << " floor_wait_us=" << config_.floor_wait_us;
    }
    *out_ << "\n" << std::endl;
  }

  Input input_;
  Config config_;
  bool hands_over_ = false;
  simulation::Simulator world_;
  Seen& seen_;
  std::ostream* out_;
  std::uint64_t next_id_ = 1;
};

inline constexpr int events_max = 600;  // of one input, before it is drained

}  // namespace fuzz

// Random events against the simulator, from a seed: `scheduler_random_driver SEED EVENTS`. Any failure is replayed by
// them.
#include <random>

#include "simulator.hpp"

using namespace simulation;

namespace {

/// A small world in which prefixes repeat, pools are tight and every bound is met.
struct Driver {
  std::mt19937_64 random;
  Config config;
  std::vector<std::vector<TokenId>> texts;  // prompts begin with a part of one of these
  std::uint64_t next_id = 1;
  bool hands_over = false;  // a worker that is not alone

  explicit Driver(std::uint64_t seed) : random(seed) {
    config.block_tokens = 16;
    config.slots = 1 + pick(8);
    config.context_tokens = 40 + pick(200);
    const int blocks_min = (config.context_tokens + 15) / 16;
    config.blocks = blocks_min + pick(blocks_min * 3);
    config.step_tokens = config.slots + pick(120);
    config.chunk_tokens = 1 + pick(80);
    config.waiting_max = 1 + pick(20);
    config.steps_in_flight = 1 + pick(3);
    config.overtakes_max = pick(4);
    config.class_overtakes_max = 1 + pick(6);
    config.preemptions_max = 1 + pick(3);
    if (pick(2) == 0) config.tps_floor = 1 + pick(100'000);  // a call is a microsecond: it is in force now and then
    config.floor_wait_us = pick(100);
    hands_over = pick(2) == 0;
    if (pick(3) > 0) config.draft_tokens = 1 + pick(15);
    if (pick(3) > 0) config.tail_tokens_min = 1 + pick(8);
    if (pick(2) == 0) {
      config.host_blocks = 1 + pick(config.blocks * 3);
      config.write_backs_max = 1 + pick(8);
      if (pick(2) == 0) config.copy_deadline_us = 1 + pick(12);  // a call is a microsecond
    }
    if (config.host_blocks == 0 && pick(2) == 0) {
      config.parts = 2 + pick(3);
      config.tail_tokens_min = 0;
      config.blocks = config.parts * (blocks_min + pick(blocks_min));
    }
    for (int i = 0; i < 3; ++i) texts.push_back(tokens(config.context_tokens));
  }

  int pick(int bound) { return static_cast<int>(random() % static_cast<std::uint64_t>(std::max(1, bound))); }
  std::vector<TokenId> tokens(int count) {
    std::vector<TokenId> out;
    for (int i = 0; i < count; ++i) out.push_back(static_cast<TokenId>(pick(Request::vocabulary)));
    return out;
  }

  /// The next turn of some sequence, seldom one that does not fit it; nothing when that one never was.
  std::optional<Request> next_turn(Simulator& world) {
    const std::uint64_t parent = 1 + random() % next_id;
    const Simulator::Text* text = world.text_of(parent);
    if (text == nullptr) return std::nullopt;
    Request turn = request();
    turn.parent = parent;
    turn.salt = pick(10) == 0 ? turn.salt : text->salt;
    turn.inherited =
        pick(3) == 0 ? static_cast<std::size_t>(pick(static_cast<int>(text->tokens.size()) + 2)) : text->tokens.size();
    const std::vector<TokenId> own = tokens(pick(30));
    turn.tokens.assign(text->tokens.begin(), text->tokens.begin() + static_cast<std::ptrdiff_t>(
                                                                        std::min(turn.inherited, text->tokens.size())));
    turn.tokens.resize(turn.inherited);
    turn.tokens.insert(turn.tokens.end(), own.begin(), own.end());
    turn.output_start = static_cast<int>(turn.tokens.size());
    turn.tokens_max = pick(60);
    return turn;
  }

  Request request() {
    Request request;
    request.id = pick(20) == 0 ? 1 + random() % next_id : next_id++;
    const auto& text = texts[static_cast<std::size_t>(pick(3))];
    const int shared = pick(config.context_tokens);
    request.tokens.assign(text.begin(), text.begin() + shared);
    for (const TokenId token : tokens(pick(20))) request.tokens.push_back(token);
    const int size = static_cast<int>(request.tokens.size());
    request.output_start = pick(6) == 0 ? 1 + pick(size) : size;
    request.tokens_max = size - request.output_start + pick(60);
    if (pick(2) == 0) request.stops = {static_cast<TokenId>(pick(64)), static_cast<TokenId>(pick(64))};
    request.priority = pick(4) == 0 ? pick(5) - 2 : 0;
    if (request.id % 13 == 5) request.expected = static_cast<int>(request.id % 60);  // hints
    if (request.id % 7 == 3) request.floor = static_cast<int>(37 * request.id % 300);
    if (pick(3) == 0) request.tenant = {static_cast<std::uint8_t>(pick(3))};
    if (pick(8) == 0) request.salt = {static_cast<std::uint8_t>(pick(2))};
    if (hands_over) request.handover = static_cast<Handover>(pick(3));
    return request;
  }
};

/// What happened in all runs: a driver that never gets into a state proves nothing about it.
struct Coverage {
  std::uint64_t preemptions = 0;
  std::uint64_t aborts = 0;
  std::uint64_t cached_tokens = 0;
  std::uint64_t output_tokens = 0;
  std::uint64_t evicted = 0;
  std::uint64_t parents_known = 0;
  std::uint64_t parents_unknown = 0;
  std::uint64_t imported = 0;
  std::uint64_t renounced = 0;
  std::uint64_t handles_ended = 0;
  std::uint64_t handed_over = 0;
  std::uint64_t handles_complete = 0;
  std::uint64_t drafts_kept = 0;
  std::uint64_t drafts_cut = 0;
  std::uint64_t drafts_refuted = 0;
  std::uint64_t tails_copied = 0;
  HostCounts host;
  std::set<std::string> states;
} coverage;

std::uint64_t run(std::uint64_t seed, int events) {
  Driver driver(seed);
  Simulator world(driver.config);
  const bool late = driver.pick(2) == 0;
  const bool drafts = driver.config.draft_tokens > 0 || driver.pick(4) == 0;
  for (int i = 0; i < events && check::failures() == 0; ++i) {
    if (world.host.in_flight() > 0 && driver.pick(4) == 0) world.end_copy(driver.random(), driver.pick(5) > 0);
    if (drafts && world.live() > 0 && driver.pick(3) == 0) {
      world.draft(driver.pick(20) == 0 ? driver.next_id : world.some_live(driver.random()), driver.pick(18),
                  driver.pick(6));
    }
    const int what = driver.pick(100);
    if (what < 8) {
      if (auto turn = driver.next_turn(world); turn && world.submit(*turn) == RejectReason::parent_unknown) {
        turn->parent.reset();  // as a router does: again, in full
        turn->inherited = 0;
        CHECK(world.submit(*turn) != RejectReason::parent_unknown);
      }
    } else if (what < 20) {
      (void)world.submit(driver.request());
    } else if (what < 25 && world.live() > 0) {
      world.abort(world.some_live(driver.random()));
    } else if (what < 27) {
      world.abort(driver.random() % (driver.next_id + 2));
    } else if (what < 30) {
      world.transfer_some(driver.random());
    } else if (what < 34 && world.transfers() > 0) {
      world.end_transfer(world.some_transfer(driver.random()), driver.pick(3) > 0, driver.pick(2) == 0);
    } else if (what < 40) {
      world.handle_event(driver.random(), static_cast<HandleEvent>(driver.pick(12)));
    } else if (what == 40 && world.live() > 0) {
      world.renounce_waiting(world.some_live(driver.random()), driver.pick(2) == 0);
    } else if (what < 65) {
      world.plan(late && driver.pick(3) > 0);
    } else {
      world.commit();
    }
    if (world.live() > 0) {
      const std::string said = world.scheduler.explain(world.some_live(static_cast<std::uint64_t>(i)));
      coverage.states.insert(said.substr(0, said.find(':')));
    }
  }
  CHECK(world.drain());
  if (world.live() > 0) std::cerr << world.explain();
  const Counts counts = world.scheduler.counts();
  CHECK_EQUAL(counts.blocks_active, 0);
  CHECK_EQUAL(counts.sequences_running + counts.sequences_waiting + counts.steps_in_flight, 0);
  coverage.preemptions += counts.preemptions;
  coverage.aborts += counts.aborts;
  coverage.cached_tokens += counts.cached_tokens;
  coverage.output_tokens += counts.output_tokens;
  coverage.parents_known += world.parents_known;
  CHECK_EQUAL(counts.handles_open + counts.sequences_importing, 0);
  CHECK_EQUAL(counts.host.loads_in_flight + counts.host.write_backs_in_flight + counts.host.copies_late, 0);
  CHECK_EQUAL(world.host.late(), counts.host.copies_expired);
  coverage.host.blocks_stored += counts.host.blocks_stored;
  coverage.host.blocks_loaded += counts.host.blocks_loaded;
  coverage.host.loads += counts.host.loads;
  coverage.host.tokens_loaded += counts.host.tokens_loaded;
  coverage.host.copies_failed += counts.host.copies_failed;
  coverage.host.copies_expired += counts.host.copies_expired;
  CHECK_EQUAL(counts.drafts.sequences, 0);
  CHECK(counts.drafts.accepted <= counts.drafts.tokens && counts.drafts.drafts <= counts.drafts.tokens);
  coverage.drafts_kept += world.drafts_kept;
  coverage.drafts_cut += world.drafts_cut;
  coverage.drafts_refuted += world.drafts_refuted;
  coverage.tails_copied += world.tails_copied;
  coverage.imported += world.imported;
  coverage.renounced += world.renounced;
  coverage.handles_ended += world.handles_ended;
  coverage.handed_over += world.handed_over;
  coverage.handles_complete += world.handles_complete;
  coverage.parents_unknown += world.parents_unknown;
  for (const CacheEvent& event : world.scheduler.take_cache_events()) {
    coverage.evicted += event.kind == CacheEvent::Kind::evicted;
  }
  return world.digest();
}

}  // namespace

int main(int argc, char** argv) {
  const std::uint64_t first = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1;
  const int events = argc > 2 ? std::atoi(argv[2]) : 400;
  const std::uint64_t count = argc > 3 ? std::strtoull(argv[3], nullptr, 10) : 1;
  for (std::uint64_t seed = first; seed < first + count; ++seed) {
    const std::uint64_t digest = run(seed, events);
    if (seed % 10 == 0) CHECK_EQUAL(run(seed, events), digest);  // the same inputs give the same plans
    if (check::failures() > 0) {
      std::cerr << "replay with: scheduler_random_driver " << seed << " " << events << "\n";
      return 1;
    }
  }
  std::cout << count << " seeds from " << first << ", " << events << " events each: ok; preemptions "
            << coverage.preemptions << ", aborts " << coverage.aborts << ", cached tokens " << coverage.cached_tokens
            << ", output tokens " << coverage.output_tokens << ", evicted blocks " << coverage.evicted
            << ", parents known " << coverage.parents_known << ", gone " << coverage.parents_unknown << ", imported "
            << coverage.imported << ", renounced " << coverage.renounced << ", handed over " << coverage.handed_over
            << " (" << coverage.handles_complete << " complete), handles ended " << coverage.handles_ended
            << "; host tier: stored " << coverage.host.blocks_stored << ", loaded " << coverage.host.blocks_loaded
            << " for " << coverage.host.loads << " prompts, failed " << coverage.host.copies_failed << ", late "
            << coverage.host.copies_expired << "; drafts: kept " << coverage.drafts_kept << ", in part "
            << coverage.drafts_cut << ", refuted " << coverage.drafts_refuted << "; tails copied "
            << coverage.tails_copied << "\n";
  if (count >= 100) {
    CHECK(coverage.imported > 100 && coverage.renounced > 100 && coverage.handed_over > 100);
    CHECK(coverage.handles_complete > 100 && coverage.handles_ended > 100);
    CHECK(coverage.tails_copied > 100);
    CHECK(coverage.host.blocks_stored > 1000 && coverage.host.blocks_loaded > 150 && coverage.host.loads > 100);
    CHECK(coverage.host.copies_failed > 100 && coverage.host.copies_expired > 50);
    CHECK(coverage.parents_known > 1000 && coverage.parents_unknown > 100);
    CHECK(coverage.drafts_kept > 100 && coverage.drafts_cut > 100 && coverage.drafts_refuted > 50);
    CHECK(coverage.preemptions > 100 && coverage.aborts > 100 && coverage.evicted > 100);
    for (const char* state :
         {"Waiting", "Held", "Prefilling", "Decoding", "Drafted", "Verifying", "Preempting", "Importing", "Loading"}) {
      if (coverage.states.count(state) == 0) check::fail(__FILE__, __LINE__, std::string(state) + " was never seen");
    }
  }
  if (check::failures() > 0) return 1;
  return 0;
}

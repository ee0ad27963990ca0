// The host tier: its slots, its copies in flight, and what a block's order of eviction is when a write-back had it.
#include "check.hpp"
#include "host_memory.hpp"
#include "request.hpp"
#include "tokenrelay/scheduler/scheduler.hpp"

using namespace tokenrelay::scheduler;

namespace {

Hash128 hash_of(std::uint64_t number) { return {number * 0x9e3779b97f4a7c15ULL, number}; }

HostSlotId store(HostPool& pool, std::uint64_t number) {
  auto slot = pool.take(hash_of(number));
  CHECK(slot.has_value());
  const HostSlotId id = host::Access::number(*slot);
  CHECK(!pool.find(hash_of(number)).readable);  // it is being written
  pool.keep(std::move(*slot));
  return id;
}

std::string broken(const HostPool& pool) { return pool.check().value_or(""); }

}  // namespace

TEST(slots_are_evicted_in_the_order_of_their_use) {
  HostPool pool(3);
  for (const std::uint64_t number : {1, 2, 3}) store(pool, number);
  CHECK_EQUAL(pool.used(), 3);
  pool.touch(hash_of(1));
  pool.give_back(pool.lend(pool.find(hash_of(2)).id), true);
  store(pool, 4);  // in the room of 3
  CHECK(pool.find(hash_of(3)).id == no_host_slot);
  store(pool, 5);  // of 1
  CHECK(pool.find(hash_of(1)).id == no_host_slot && pool.find(hash_of(2)).readable);
  CHECK_EQUAL(broken(pool), std::string());
}

TEST(a_slot_that_a_load_reads_is_not_evicted) {
  HostPool pool(2);
  store(pool, 1);
  store(pool, 2);
  host::Loan first = pool.lend(pool.find(hash_of(1)).id);
  host::Loan again = pool.lend(pool.find(hash_of(1)).id);
  host::Loan second = pool.lend(pool.find(hash_of(2)).id);
  CHECK(!pool.take(hash_of(3)).has_value());
  // One that failed is found no more, though the other one still reads it; its room comes back with the last.
  pool.give_back(std::move(again), false);
  CHECK(pool.find(hash_of(1)).id == no_host_slot);
  CHECK(!pool.take(hash_of(3)).has_value());
  CHECK_EQUAL(broken(pool), std::string());
  pool.give_back(std::move(first), true);
  store(pool, 3);
  pool.give_back(std::move(second), true);
  CHECK_EQUAL(broken(pool), std::string());
}

TEST(a_slot_that_was_filled_in_vain_is_empty) {
  HostPool pool(1);
  auto slot = pool.take(hash_of(1));
  CHECK(!pool.take(hash_of(2)).has_value());
  pool.drop(std::move(*slot));
  CHECK(pool.find(hash_of(1)).id == no_host_slot);
  CHECK_EQUAL(pool.used(), 0);
  store(pool, 2);
  CHECK_EQUAL(broken(pool), std::string());
}

TEST(handles_are_linear) {
  EXPECT_ABORT("a host slot's handle was dropped", {
    HostPool pool(1);
    (void)pool.take(hash_of(1));
  });
}

TEST(the_order_of_eviction_is_the_same_with_and_without_write_backs) {
  for (const Eviction eviction : {Eviction::lru, Eviction::reuse}) {
    std::vector<BlockId> order[2];
    for (const bool borrows : {false, true}) {
      BlockPool pool(6, 16, eviction);
      HostPool host(8);
      pool.mirror(host);
      std::vector<SealedPin> pins;
      const std::vector<TokenId> tokens(16, 7);
      for (std::uint64_t i = 0; i < 6; ++i) {
        pins.push_back(pool.seal(*pool.take(no_block), Content{hash_of(i + 1), {}, tokens}));
      }
      std::vector<SealedPin> borrowed;
      const auto borrow = [&] {
        if (!borrows) return;
        for (int i = 0; i < 2; ++i) borrowed.push_back(pool.borrow(pool.next_unwritten()));
      };
      borrow();  // blocks 0 and 1, in use
      for (std::size_t i = 0; i < 6; ++i) {
        pool.clock(static_cast<std::int64_t>(i + 1));
        pool.unpin(std::move(pins[(i + 3) % 6]));
      }
      borrow();  // 2 and 3, cached
      CHECK_EQUAL(pool.borrowed(), borrows ? 4 : 0);
      CHECK_EQUAL(pool.cached(), borrows ? 2 : 6);
      while (!borrowed.empty()) {
        pool.give_back(std::move(borrowed.back()));
        borrowed.pop_back();
      }
      CHECK_EQUAL(pool.check().value_or(""), std::string());
      while (auto block = pool.take(no_block)) {
        order[borrows].push_back(block::Access::dissolve(std::move(*block)));
      }
    }
    CHECK(order[0] == order[1]);
    CHECK_EQUAL(order[0].front(), 3);
  }
}

namespace {

Config small() {
  Config config;
  config.block_tokens = 16;
  config.blocks = 4;
  config.slots = 2;
  config.context_tokens = 64;
  config.steps_in_flight = 1;
  config.host_blocks = 8;
  config.copy_deadline_us = 1000;
  return config;
}

/// One prompt, all of one token, with one token of output; its copies are left as they come.
void serve(Scheduler& scheduler, std::uint64_t id, TokenId token, int length, std::int64_t now_us) {
  const std::vector<TokenId> tokens(static_cast<std::size_t>(length), token);
  Submission submission;
  submission.sequence_id = id;
  submission.token_ids = tokens;
  submission.output_start = length;
  submission.tokens_max = 1;
  CHECK(!scheduler.submit(submission, now_us));
  Plan plan;
  Outcome outcome;
  if (!scheduler.plan(now_us, plan)) return;
  const std::vector<TokenId> sampled(static_cast<std::size_t>(plan.sampled), 1);
  scheduler.commit(plan.step, sampled, now_us, outcome);
}

Copies next_copies(Scheduler& scheduler, std::int64_t now_us) {
  Plan plan;
  CHECK(!scheduler.plan(now_us, plan));
  Copies copies;
  scheduler.take_copies(copies);
  CHECK_EQUAL(scheduler.check().value_or(""), std::string());
  return copies;
}

}  // namespace

TEST(a_load_bumps_the_generation_of_what_it_writes) {
  Scheduler scheduler(small());
  serve(scheduler, 1, 5, 40, 1);
  CHECK_EQUAL(scheduler.copied(next_copies(scheduler, 2).store_ids), 2U);
  serve(scheduler, 2, 6, 60, 3);
  CHECK_EQUAL(scheduler.copied(next_copies(scheduler, 4).store_ids), 3U);
  const std::vector<std::uint64_t> before(scheduler.generations().begin(), scheduler.generations().end());
  serve(scheduler, 3, 5, 40, 5);  // it only begins to load
  Copies copies;
  scheduler.take_copies(copies);
  CHECK_EQUAL(copies.load_ids.size(), 2U);
  CHECK_EQUAL(scheduler.counts().sequences_loading, 1);
  for (const std::int32_t block : copies.load_blocks) {
    CHECK_EQUAL(scheduler.generations()[static_cast<std::size_t>(block)], before[static_cast<std::size_t>(block)] + 1);
  }
  CHECK_EQUAL(scheduler.copy_deadline_us().value_or(-1), 1005);
}

TEST(an_id_that_is_not_in_flight_changes_nothing) {
  Scheduler scheduler(small());
  serve(scheduler, 1, 5, 40, 1);
  const Copies copies = next_copies(scheduler, 2);
  const std::vector<std::uint64_t> wrong{0, 1, copies.store_ids[0] + 1'000'000, ~0ULL};
  CHECK_EQUAL(scheduler.copied(wrong) + scheduler.copy_failed(wrong), 0U);
  CHECK_EQUAL(scheduler.copied(copies.store_ids), 2U);
  CHECK_EQUAL(scheduler.copied(copies.store_ids), 0U);
  Scheduler without([] {
    Config config = small();
    config.host_blocks = 0;
    return config;
  }());
  CHECK_EQUAL(without.copied(copies.store_ids), 0U);
  CHECK(!without.copy_deadline_us());
}

TEST(a_late_copy_is_reported_once_and_keeps_what_it_holds) {
  Scheduler scheduler(small());
  serve(scheduler, 1, 5, 40, 1);
  const Copies copies = next_copies(scheduler, 2);
  (void)next_copies(scheduler, 1001);
  CHECK(scheduler.take_late_copies().empty());
  (void)next_copies(scheduler, 1002);
  const std::vector<LateCopy> late = scheduler.take_late_copies();
  CHECK_EQUAL(late.size(), 2U);
  CHECK(!late[0].load && late[0].id == copies.store_ids[0]);
  (void)next_copies(scheduler, 1'000'000);
  CHECK(scheduler.take_late_copies().empty());
  CHECK_EQUAL(scheduler.counts().blocks_active, 2);
  CHECK_EQUAL(scheduler.counts().host.copies_late, 2);
  CHECK_EQUAL(scheduler.copy_failed(copies.store_ids), 2U);
  CHECK_EQUAL(scheduler.counts().blocks_active + scheduler.counts().host.blocks_used, 0);
}

TEST(a_scheduler_is_destroyed_with_copies_in_flight) {
  Scheduler scheduler(small());
  serve(scheduler, 1, 5, 40, 1);
  CHECK_EQUAL(scheduler.copied(next_copies(scheduler, 2).store_ids), 2U);
  serve(scheduler, 2, 6, 60, 3);
  serve(scheduler, 3, 5, 40, 5);
  CHECK(scheduler.counts().host.loads_in_flight + scheduler.counts().host.write_backs_in_flight > 0);
}

TEST(bookkeeping_is_small) {
  Config config = small();
  config.blocks = 20'000;
  config.host_blocks = 100'000;
  const Scheduler with(config);
  config.host_blocks = 0;
  const Scheduler without(config);
  CHECK(with.bookkeeping_bytes_per_block() <= without.bookkeeping_bytes_per_block() + 4.01);
  CHECK(with.bookkeeping_bytes_per_block() <= 128);
  CHECK(HostPool(100'000).bytes() <= 45U * 100'000);
}

CHECK_MAIN

// What the reuse model says, what ghosts remember, the order in which the evictor gives blocks up, and what it costs.
#include <map>
#include <random>

#include "check.hpp"
#include "tokenrelay/scheduler/chain.hpp"

using namespace tokenrelay::scheduler;

namespace {

constexpr int block_tokens = 16;
constexpr std::int64_t second_us = 1'000'000;
Hash128 hash(std::uint64_t value) { return {value * 0x9e3779b97f4a7c15ULL, value}; }
std::vector<TokenId> zeros(block_tokens);

/// A sealed block behind the one with `parent` (0: none).
SealedPin sealed(BlockPool& pool, std::uint64_t value, std::uint64_t parent) {
  return pool.seal(*pool.take(no_block), Content{hash(value), parent == 0 ? Hash128{} : hash(parent), zeros});
}

/// A sequence's chain of blocks `first`, `first + 1`, ... leaves the pool's readers, the last block first.
void cache_chain(BlockPool& pool, std::uint64_t first, std::uint64_t blocks, const Usage& usage) {
  std::vector<SealedPin> pins;
  for (std::uint64_t i = 0; i < blocks; ++i) pins.push_back(sealed(pool, first + i, i == 0 ? 0 : first + i - 1));
  pool.releasing(usage);
  for (std::size_t i = pins.size(); i-- > 0;) pool.unpin(std::move(pins[i]), i);
}

/// Which block goes when room is needed: the number in its hash.
std::uint64_t evicted(BlockPool& pool) {
  (void)pool.take_events();
  pool.release(*pool.take(no_block));
  const auto events = pool.take_events();
  return events.size() == 1 && events[0].kind == CacheEvent::Kind::evicted ? events[0].hash.high : 0;
}

}  // namespace

TEST(buckets_are_half_octaves) {
  CHECK_EQUAL(ReuseModel::bucket_of(-5), 0);
  CHECK_EQUAL(ReuseModel::bucket_of(1023), 0);
  for (int bucket = 1; bucket < ReuseModel::buckets; ++bucket) {
    const auto begin = static_cast<std::int64_t>(ReuseModel::begin_us(bucket));
    CHECK_EQUAL(ReuseModel::bucket_of(begin), bucket);
    CHECK_EQUAL(ReuseModel::bucket_of(begin - 1), bucket - 1);
  }
  CHECK_EQUAL(ReuseModel::bucket_of(INT64_MAX), ReuseModel::buckets - 1);
}

TEST(what_nobody_has_seen_looks_the_same_for_all_kinds_and_falls_with_its_age) {
  const ReuseModel model;
  double last = 1;
  for (std::int64_t idle = 8192; idle < 3600 * second_us; idle += 977 * 1000) {
    const double rate = model.rate(0, idle);
    for (ReuseKind kind = 1; kind < reuse_kinds; ++kind) CHECK_EQUAL(model.rate(kind, idle), rate);
    CHECK(rate > 0 && rate < last);
    last = rate;
  }
}

TEST(the_kind_that_comes_back_is_worth_more_until_it_is_late) {
  ReuseModel model;
  const ReuseKind turns = reuse_kind(Origin::turn, 1);
  const ReuseKind prompts = reuse_kind(Origin::prompt, 0);
  std::int64_t now = 0;
  for (int i = 0; i < 2000; ++i) {
    model.clock(now += second_us);
    model.idle(turns);
    model.reused(turns, 5 * second_us);
    model.idle(prompts);
    model.gone(prompts, 600 * second_us);
  }
  CHECK(model.rate(turns, second_us) > 20 * model.rate(prompts, second_us));
  CHECK(model.rate(turns, 4 * second_us) > model.rate(turns, 20 * second_us));  // they come after 5 s or not at all
  CHECK_EQUAL(model.seen(turns).watched, 0);
  CHECK(model.seen(turns).reused > 500 && model.seen(turns).gone == 0);
  CHECK(model.seen(prompts).gone > 500 && model.seen(prompts).reused == 0);
}

TEST(a_kind_that_changes_its_ways_is_learned_anew) {
  ReuseModel model;
  for (int i = 0; i < 5000; ++i) {
    model.clock(i * second_us);
    model.idle(0);
    model.reused(0, second_us);
  }
  const double before = model.rate(0, second_us);
  for (int i = 0; i < 30000; ++i) {
    model.clock((5000 + i) * second_us);
    model.idle(0);
    model.gone(0, 100 * second_us);
  }
  CHECK(model.rate(0, second_us) < before / 4);
}

TEST(ghosts_agree_with_a_map) {
  for (const std::size_t blocks : {3U, 100U, 4096U}) {
    Ghosts ghosts(blocks);
    std::map<std::uint64_t, std::int64_t> model;  // by the number of the hash: when it was used
    std::mt19937_64 random(7);
    std::size_t dropped = 0;
    for (std::int64_t now = 1; now < 40'000; ++now) {
      const std::uint64_t value = random() % (8 * blocks);
      const auto found = ghosts.take(hash(value));
      CHECK_EQUAL(found.has_value(), model.contains(value));
      if (found) CHECK_EQUAL(found->used_us, model[value]);
      model.erase(value);
      if (random() % 4 == 0) continue;
      if (const auto oldest = ghosts.add(hash(value), {now, 250, 3})) {
        ++dropped;
        CHECK_EQUAL(static_cast<int>(oldest->kind), 3);
        CHECK_EQUAL(std::erase_if(model, [&](const auto& e) { return e.second == oldest->used_us; }), std::size_t{1});
      }
      model[value] = now;
    }
    CHECK(dropped > 0);
  }
}

TEST(a_child_goes_before_its_parent_whatever_their_kinds) {
  BlockPool pool(6, block_tokens);
  pool.clock(1);
  cache_chain(pool, 1, 3, {Origin::prompt, 2});  // 1 <- 2 <- 3
  CHECK_EQUAL(pool.free(), 3);
  pool.clock(100 * second_us);
  {
    std::vector<SealedPin> pins;  // another sequence: 1 and 2 are used again, 4 is new
    pins.push_back(pool.pin(pool.find(hash(1)).id));
    pins.push_back(pool.pin(pool.find(hash(2)).id));
    pins.push_back(sealed(pool, 4, 2));
    pool.releasing({Origin::tool_turn, 9});
    for (std::size_t i = pins.size(); i-- > 0;) pool.unpin(std::move(pins[i]), i);
  }
  cache_chain(pool, 11, 2, {Origin::prompt, 2});
  CHECK(!pool.check());
  std::vector<WritableBlock> held;
  std::vector<std::uint64_t> order;
  (void)pool.take_events();
  while (auto block = pool.take(no_block)) {
    held.push_back(std::move(*block));
    for (const CacheEvent& event : pool.take_events()) order.push_back(event.hash.high);
  }
  const auto place = [&](std::uint64_t value) { return std::find(order.begin(), order.end(), value) - order.begin(); };
  CHECK_EQUAL(order.size(), std::size_t{6});
  CHECK_EQUAL(order[0], std::uint64_t{3});  // it was left long before all others
  CHECK(place(4) < place(2) && place(3) < place(2) && place(2) < place(1) && place(12) < place(11));
  for (WritableBlock& block : held) pool.release(std::move(block));
}

TEST(what_comes_back_is_kept_and_what_does_not_goes) {
  BlockPool pool(8, block_tokens);
  const Usage one_off{Origin::prompt, 9};
  const Usage turn{Origin::turn, 9};
  std::int64_t now = 0;
  std::uint64_t next = 1000;
  cache_chain(pool, 1, 2, turn);
  // A session comes back every 10 s; four one-offs a second pass, so that LRU would have lost it each time.
  int found = 0;
  for (int round = 0; round < 400; ++round) {
    for (int i = 0; i < 40; ++i) {
      pool.clock(now += second_us / 4);
      cache_chain(pool, next, 1, one_off);
      next += 10;
    }
    const bool there = pool.find(hash(1)).sealed && pool.find(hash(2)).sealed;
    found += there && round >= 200;
    std::vector<SealedPin> pins;
    for (const std::uint64_t value : {1U, 2U}) {
      const BlockPool::Found block = pool.find(hash(value));
      pins.push_back(block.sealed ? pool.pin(block.id) : sealed(pool, value, value - 1));
    }
    pool.releasing(turn);
    for (std::size_t i = pins.size(); i-- > 0;) pool.unpin(std::move(pins[i]), i);
    CHECK(!pool.check());
  }
  CHECK(found > 190);
}

TEST(a_cached_block_whose_child_is_read_can_still_go) {
  BlockPool pool(2, block_tokens);
  SealedPin parent = sealed(pool, 1, 0);
  SealedPin child = sealed(pool, 2, 1);
  pool.unpin(std::move(parent));  // a reader of the child that has its own copy of the parent
  CHECK_EQUAL(pool.available(), 1);
  CHECK_EQUAL(evicted(pool), std::uint64_t{1});
  CHECK(!pool.check());
  pool.unpin(std::move(child));
  CHECK(!pool.check());
}

TEST(lru_is_the_order_of_the_last_use) {
  BlockPool pool(4, block_tokens, Eviction::lru);
  cache_chain(pool, 1, 2, {Origin::tool_turn, 9});
  cache_chain(pool, 11, 2, {});
  pool.unpin(pool.pin(pool.find(hash(2)).id));
  CHECK_EQUAL(evicted(pool), std::uint64_t{1});  // though 2 follows it
  pool.unpin(pool.pin(pool.find(hash(12)).id));
  CHECK(!pool.check());
}

TEST(a_block_costs_no_more_than_128_bytes_beside_its_kv_and_its_token_ids) {
  for (const int blocks : {20'000, 65'536, 65'537, 100'000}) {
    const BlockPool pool(blocks, 64);
    const auto all = static_cast<std::size_t>(blocks);
    CHECK(pool.bytes().bookkeeping <= 124 * all);  // 4 more are the hold board's
    CHECK_EQUAL(pool.bytes().token_ids, all * 64 * sizeof(TokenId));
  }
}

CHECK_MAIN

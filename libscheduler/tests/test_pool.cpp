// The block pool: eviction order, runs, promises, duplicates, and the assertions that stay on.
#include "check.hpp"
#include "tokenrelay/scheduler/chain.hpp"

using namespace tokenrelay::scheduler;

namespace {

constexpr int block_tokens = 16;
Hash128 hash(std::uint64_t value) { return {value * 0x9e3779b97f4a7c15ULL, value}; }
std::vector<TokenId> zeros(block_tokens);
Content content(std::uint64_t value) { return {hash(value), {}, zeros}; }

BlockId cache(BlockPool& pool, std::uint64_t value) {
  SealedPin pin = pool.seal(*pool.take(no_block), content(value));
  const BlockId id = block::read(pin);
  pool.unpin(std::move(pin));
  return id;
}

std::string kinds(BlockPool& pool) {
  std::string text;
  for (const CacheEvent& event : pool.take_events()) {
    text += event.kind == CacheEvent::Kind::sealed ? "+" : event.kind == CacheEvent::Kind::evicted ? "-" : "?";
    text += std::to_string(event.hash.high) + " ";
  }
  return text;
}

}  // namespace

TEST(free_blocks_go_first_then_the_least_recently_used_cached_one) {
  BlockPool pool(3, block_tokens);
  const BlockId first = cache(pool, 1);
  const BlockId second = cache(pool, 2);
  CHECK_EQUAL(pool.free(), 1);
  CHECK_EQUAL(pool.cached(), 2);
  pool.unpin(pool.pin(first));  // used again: the second is now the oldest
  WritableBlock a = *pool.take(no_block);
  WritableBlock b = *pool.take(no_block);
  CHECK_EQUAL(table_entry(b), second);
  CHECK_EQUAL(pool.find(hash(2)).id, no_block);
  CHECK_EQUAL(pool.find(hash(1)).id, first);
  CHECK_EQUAL(kinds(pool), std::string("+1 +2 -2 "));
  CHECK(!pool.check());
  SealedPin pin = pool.pin(first);
  CHECK(!pool.take(no_block).has_value());  // a pinned block is not evicted
  pool.unpin(std::move(pin));
  pool.release(std::move(a));
  pool.release(std::move(b));
  CHECK_EQUAL(pool.free(), 2);
}

TEST(a_run_goes_on_where_it_can) {
  BlockPool pool(6, block_tokens);
  std::vector<WritableBlock> held;
  for (int i = 0; i < 4; ++i) held.push_back(*pool.take(no_block));  // 0 1 2 3
  pool.release(std::move(held[1]));
  pool.release(std::move(held[2]));
  WritableBlock next = *pool.take(0);
  CHECK_EQUAL(table_entry(next), 1);  // though 4 has been free for longer
  WritableBlock after = *pool.take(5);
  CHECK_EQUAL(table_entry(after), 4);  // no block 6: the first free one
  pool.release(std::move(next));
  pool.release(std::move(after));
  pool.release(std::move(held[0]));
  pool.release(std::move(held[3]));
  CHECK_EQUAL(pool.free(), 6);
}

TEST(a_promise_is_found_watched_and_withdrawn) {
  BlockPool pool(4, block_tokens);
  WritableBlock block = *pool.take(no_block);
  CHECK(pool.promise(block, content(1)));
  const BlockPool::Found found = pool.find(hash(1));
  CHECK_EQUAL(found.id, table_entry(block));
  CHECK(!found.sealed);
  pool.watch(found.id);
  WritableBlock twin = *pool.take(no_block);
  CHECK(!pool.promise(twin, content(1)));  // one promise for one content
  pool.release(std::move(twin));
  CHECK(pool.fired().empty());
  pool.release(std::move(block));
  CHECK_EQUAL(pool.fired().size(), 1U);
  CHECK_EQUAL(pool.find(hash(1)).id, no_block);
  CHECK(!pool.check());
}

TEST(a_duplicate_stays_private_and_inherits_the_content) {
  BlockPool pool(4, block_tokens);
  SealedPin first = pool.seal(*pool.take(no_block), content(7));
  SealedPin twin = pool.seal(*pool.take(no_block), content(7));
  const BlockId first_id = block::read(first);
  const BlockId twin_id = block::read(twin);
  CHECK(first_id != twin_id);
  CHECK_EQUAL(pool.find(hash(7)).id, first_id);
  pool.unpin(std::move(twin));
  CHECK_EQUAL(pool.free(), 3);  // the index has the content: the twin is free
  SealedPin other = pool.seal(*pool.take(no_block), content(7));
  const BlockId other_id = block::read(other);
  pool.unpin(std::move(first));
  std::vector<WritableBlock> held;
  while (pool.available() > 0) held.push_back(*pool.take(no_block));  // evicts the first
  CHECK_EQUAL(pool.find(hash(7)).id, no_block);
  pool.unpin(std::move(other));
  CHECK_EQUAL(pool.find(hash(7)).id, other_id);  // the twin took its place
  CHECK_EQUAL(kinds(pool), std::string("+7 -7 +7 "));
  for (WritableBlock& block : held) pool.release(std::move(block));
  CHECK(!pool.check());
}

TEST(the_child_that_followed_last_is_found_by_its_tokens) {
  BlockPool pool(4, block_tokens);
  const std::vector<TokenId> ones(block_tokens, 1);
  const std::vector<TokenId> twos(block_tokens, 2);
  SealedPin parent = pool.seal(*pool.take(no_block), content(1));
  const BlockId id = block::read(parent);
  CHECK_EQUAL(pool.find_child(id, ones), no_block);
  SealedPin first = pool.seal(*pool.take(no_block), {hash(2), hash(1), ones});
  CHECK_EQUAL(pool.find_child(id, ones), block::read(first));
  CHECK_EQUAL(pool.find_child(id, twos), no_block);
  WritableBlock second = *pool.take(no_block);
  pool.promise(second, {hash(3), hash(1), twos});
  CHECK_EQUAL(pool.find_child(id, twos), table_entry(second));
  CHECK_EQUAL(pool.find_child(id, ones), no_block);  // only the last one: the other is found by its hash
  const BlockId second_id = table_entry(second);
  pool.release(std::move(second));
  CHECK_EQUAL(pool.find_child(id, twos), no_block);  // given up
  SealedPin reused = pool.seal(*pool.take(second_id - 1), {hash(4), hash(2), twos});
  CHECK_EQUAL(block::read(reused), second_id);
  CHECK_EQUAL(pool.find_child(id, twos), no_block);  // the same block and tokens, but after another parent
  pool.unpin(std::move(reused));
  pool.unpin(std::move(first));
  pool.unpin(std::move(parent));
  CHECK(!pool.check());
}

TEST(cache_events_are_bounded_and_say_what_was_lost) {
  BlockPool pool(2, block_tokens);
  for (std::uint64_t i = 0; i < 100; ++i) cache(pool, i);
  const auto events = pool.take_events();
  CHECK_EQUAL(events.size(), 2U * 2U + 64U + 1U);
  CHECK(events.front().kind == CacheEvent::Kind::lost);
  CHECK(events.back().hash == hash(99));
  CHECK(pool.take_events().empty());
}

TEST(an_index_of_colliding_hashes_survives_erasure) {
  BlockPool pool(64, block_tokens);
  std::vector<SealedPin> pins;
  for (std::uint64_t i = 0; i < 64; ++i)
    pins.push_back(pool.seal(*pool.take(no_block), Content{{i % 3, i}, {}, zeros}));  // three chains
  for (SealedPin& pin : pins) pool.unpin(std::move(pin));
  std::vector<WritableBlock> held;
  for (int i = 0; i < 32; ++i) held.push_back(*pool.take(no_block));
  int gone = 0;  // which ones, is the evictor's choice
  for (std::uint64_t i = 0; i < 64; ++i) {
    const BlockId id = pool.find({i % 3, i}).id;
    gone += id == no_block;
    if (id != no_block) CHECK(pool.records()[static_cast<std::size_t>(id)].hash == (Hash128{i % 3, i}));
  }
  CHECK_EQUAL(gone, 32);
  CHECK(!pool.check());
  for (WritableBlock& block : held) pool.release(std::move(block));
}

TEST(blocks_of_a_chain_land_in_order_and_seal_when_full) {
  struct Hashes {
    Content content(std::size_t index) noexcept { return {{index + 1, 77}, {index, 77}, zeros}; }
  } source;
  BlockPool pool(8, block_tokens);
  BlockChain chain(4, 4);
  for (int i = 0; i < 3; ++i) chain.fill(*pool.take(i - 1));
  chain.filled();
  chain.launch(pool.records(), 0, 20, 16);   // blocks 0 and 1
  chain.launch(pool.records(), 20, 12, 16);  // the rest of block 1
  CHECK_EQUAL(chain.in_flight().size(), 2U);
  chain.land(pool, 0, 20, 16, source);
  CHECK_EQUAL(chain.sealed().size(), 1U);
  CHECK_EQUAL(chain.in_flight().size(), 1U);  // another step writes block 1
  chain.land(pool, 20, 12, 16, source);
  CHECK_EQUAL(chain.sealed().size(), 2U);
  chain.launch(pool.records(), 32, 1, 16);
  Remains remains = std::move(chain).abandon(pool);
  CHECK_EQUAL(pool.available(), 5);  // the pins and the quarantined block are held
  EXPECT_ABORT("may still write a quarantined block", std::move(remains).release(pool));
  remains.land(pool, 32, 1, 16);
  std::move(remains).release(pool);
  CHECK_EQUAL(pool.free(), 6);
  CHECK_EQUAL(pool.cached(), 2);
}

TEST(what_the_compiler_cannot_see_aborts) {
  BlockPool pool(2, block_tokens);
  EXPECT_ABORT("a block handle was dropped", auto block = pool.take(no_block));
  EXPECT_ABORT("a moved-from block handle was used", {
    WritableBlock block = *pool.take(no_block);
    pool.release(std::move(block));
    pool.release(std::move(block));  // NOLINT(bugprone-use-after-move): the point of the test
  });
  EXPECT_ABORT("a block handle was overwritten", {
    WritableBlock block = *pool.take(no_block);
    block = *pool.take(no_block);
  });
  EXPECT_ABORT("Land needs another writer", {
    InFlightBlock block = on(*pool.take(no_block), block::Launch{pool.records()});
    block = on(std::move(block), block::Land{pool.records()});
  });
  EXPECT_ABORT("a block holds other tokens than it promised", {
    WritableBlock block = *pool.take(no_block);
    pool.promise(block, content(1));
    (void)pool.seal(std::move(block), content(2));
  });
}

CHECK_MAIN

// Where drafts come from and where they are kept: the index of n-grams, and the pool.
#include <algorithm>
#include <random>

#include "check.hpp"
#include "tokenrelay/scheduler/drafts.hpp"
#include "tokenrelay/scheduler/floor.hpp"
#include "tokenrelay/scheduler/ngrams.hpp"

using namespace tokenrelay::scheduler;

namespace {

using Tokens = std::vector<TokenId>;

struct Draft {
  Tokens tokens;
  int matched;
  friend bool operator==(const Draft&, const Draft&) = default;
};

Draft find(const NgramIndex& index, std::size_t width) {
  Tokens room(width);
  const auto found = index.find(room);
  room.resize(found.tokens);
  return {room, found.matched};
}

/// What the index is to answer, by a look at all of the text. `text`: what it remembers.
Draft expected(const Tokens& text, std::size_t order, std::size_t width) {
  std::size_t best = 0;
  std::size_t matched = order - 1;
  int places = 0;
  for (std::size_t end = text.size() - 1; end >= order && matched < NgramIndex::matched_max; --end) {
    std::size_t same = 0;
    while (same < std::min<std::size_t>(end, NgramIndex::matched_max) &&
           text[end - 1 - same] == text[text.size() - 1 - same])
      ++same;
    if (same < order) continue;
    if (++places > NgramIndex::places_max) break;
    if (same > matched) best = end, matched = same;
  }
  if (best == 0) return {{}, 0};
  Tokens tokens;
  for (std::size_t i = 0; i < width; ++i) {
    tokens.push_back(best + i < text.size() ? text[best + i] : tokens[best + i - text.size()]);
  }
  return {tokens, static_cast<int>(matched)};
}

}  // namespace

TEST(the_draft_is_what_followed_before) {
  NgramIndex index(2, 1000);
  index.extend(Tokens{1, 2, 3, 4, 5, 9, 1, 2});
  CHECK(find(index, 3) == (Draft{{3, 4, 5}, 2}));
  index.extend(Tokens{7});
  CHECK(find(index, 3) == (Draft{{}, 0}));
  index.extend(Tokens{4, 5});
  CHECK(find(index, 2) == (Draft{{9, 1}, 2}));
}

TEST(more_tokens_in_common_win_then_the_latest) {
  NgramIndex index(2, 1000);
  index.extend(Tokens{8, 1, 2, 50, 7, 1, 2, 60, 8, 1, 2});
  CHECK(find(index, 1) == (Draft{{50}, 3}));
  index.extend(Tokens{70, 9, 1, 2});
  CHECK(find(index, 1) == (Draft{{70}, 2}));
}

TEST(a_text_that_repeats_itself_goes_on) {
  NgramIndex index(3, 1000);
  index.extend(Tokens{5, 6, 5, 6, 5, 6});
  CHECK(find(index, 5) == (Draft{{5, 6, 5, 6, 5}, 4}));
}

TEST(short_texts_have_no_draft) {
  NgramIndex index(3, 1000);
  CHECK(find(index, 4) == (Draft{{}, 0}));
  index.extend(Tokens{1, 1, 1});
  CHECK(find(index, 4) == (Draft{{}, 0}));
  index.extend(Tokens{1});
  CHECK(find(index, 2) == (Draft{{1, 1}, 3}));
  CHECK(find(index, 0) == (Draft{{}, 0}));
}

/// Token by token and in pieces, over several times what it remembers: the same as by a look at the whole text. Hashes
/// that meet by chance could cost places, but no more than a few of so many.
TEST(it_finds_what_a_search_of_the_text_finds) {
  std::mt19937 random(1);
  for (const std::size_t order : {1U, 2U, 3U, 5U}) {
    NgramIndex index(static_cast<int>(order), 256);
    Tokens text;  // all of it
    int differ = 0;
    int found = 0;
    for (int i = 0; i < 1500; ++i) {
      Tokens piece(random() % 10 == 0 ? random() % 40 : 1);
      for (TokenId& token : piece) token = random() % 4;
      text.insert(text.end(), piece.begin(), piece.end());
      index.extend(piece);
      CHECK(index.size() <= 256);
      if (text.size() >= 128) CHECK(index.size() >= 128);
      if (index.size() < 2) continue;
      const Tokens known(text.end() - static_cast<std::ptrdiff_t>(index.size()), text.end());
      const Draft draft = find(index, 6);
      found += !draft.tokens.empty();
      differ += !(draft == expected(known, order, 6));
    }
    CHECK(found > 200);
    CHECK(differ * 20 < found);
  }
}

TEST(memory_is_bounded) {
  NgramIndex index(3, 4096);
  Tokens text(100'000);
  std::mt19937 random(2);
  for (TokenId& token : text) token = random() % 1000;
  index.extend(text);
  for (int i = 0; i < 20'000; ++i) index.extend(Tokens{static_cast<TokenId>(random() % 1000)});
  CHECK(index.size() <= 4096);
  CHECK(index.bytes() <= 4096 * 24);
}

TEST(a_draft_is_leased_and_given_back) {
  DraftPool pool(2);
  auto lease = pool.lease(Tokens{1, 2, 3});
  CHECK_EQUAL(pool.leased(), 1);
  pool.advance(lease);
  CHECK_EQUAL(pool.tokens(lease).front(), 2U);
  CHECK_EQUAL(pool.tokens(lease).size(), 2U);
  auto other = pool.lease(Tokens(40, 7));  // cut
  CHECK_EQUAL(pool.tokens(other).size(), static_cast<std::size_t>(draft_tokens_max));
  EXPECT_ABORT("a draft is of a sequence in a slot", (void)pool.lease(Tokens{1}));
  pool.give_back(std::move(lease));
  pool.give_back(std::move(other));
  CHECK_EQUAL(pool.leased(), 0);
  EXPECT_ABORT("a draft was dropped", {
    DraftPool short_lived(1);
    auto dropped = short_lived.lease(Tokens{1});
  });
}

/// A device on which a step takes 10 ms and 1 ms more for each row: at half of batch 1's rate there are 11 ms for
/// guesses.
TEST(drafts_get_the_time_that_the_floor_leaves) {
  CostModel model;
  const auto step = [&](double rows) {
    const StepShape shape{.decode_rows = rows, .decode_context = 100 * rows};
    model.observe(shape, 10'000 + 1'000 * rows);
    return shape;
  };
  for (int i = 0; i < 200; ++i)
    for (const double rows : {1, 2, 4, 8, 16}) step(rows);
  Config config;
  Floor off(config);
  CHECK_EQUAL(off.draft_tokens(model, 1, 40), 40);
  config.tps_floor = 70;
  Floor floor(config);
  CHECK_EQUAL(floor.draft_tokens(model, 1, 40), 40);  // what batch 1 runs at is not known yet
  for (int i = 0; i < 50; ++i) floor.committed(model, step(1));
  floor.enter(0);
  floor.begin(0);
  CHECK_EQUAL(floor.draft_tokens(model, 1, 4), 4);
  const int alone = floor.draft_tokens(model, 1, 40);
  CHECK(alone >= 8 && alone <= 12);
  const int beside = floor.draft_tokens(model, 8, 40);
  CHECK(beside >= 1 && beside < alone);
  CHECK_EQUAL(floor.draft_tokens(model, 16, 40), 0);
  CHECK_EQUAL(floor.draft_tokens(model, 1, 0), 0);
  floor.enter(20);  // who needs less makes no time while another one is there
  floor.begin(0);
  CHECK_EQUAL(floor.draft_tokens(model, 1, 40), alone);
  floor.leave(0);
  floor.begin(0);
  CHECK(floor.draft_tokens(model, 1, 40) > alone);
  floor.enter(140);  // in force is what batch 1 allows, as with the configured one
  floor.begin(0);
  CHECK_EQUAL(floor.draft_tokens(model, 1, 40), alone);
}

TEST(the_highest_floor_is_known) {
  FloorCensus census;
  CHECK_EQUAL(census.highest(70), 0);
  for (const int tps : {0, 1, 63, 64, 999, 1000}) {
    census.enter(tps);
    CHECK_EQUAL(census.highest(70), std::max(70, tps));
    CHECK_EQUAL(census.highest(0), tps);
  }
  census.enter(1000);
  for (const int tps : {1000, 1000, 999, 64}) census.leave(tps);
  CHECK_EQUAL(census.highest(0), 63);
  for (const int tps : {0, 63, 1}) census.leave(tps);
  CHECK_EQUAL(census.highest(70), 0);
  CHECK_EQUAL(census.size(), 0);
  CHECK_EQUAL(FloorCensus::clamp(-1), 0);
  CHECK_EQUAL(FloorCensus::clamp(std::int64_t{1} << 40), 1000);
}

CHECK_MAIN

// What an event gets in every state: the tables are complete (the compiler checked it), so here are the answers.
#include <set>

#include "check.hpp"
#include "tokenrelay/scheduler/request_table.hpp"

using namespace tokenrelay::scheduler;

TEST(every_pair_is_listed_once) {
  for (const auto table : {RequestFsm::table, BlockFsm::table, HostSlotFsm::table, CopyFsm::table}) {
    std::set<std::pair<std::string_view, std::string_view>> pairs;
    for (const fsm::Row& row : table) {
      CHECK(pairs.insert({row.state, row.event}).second);
      CHECK(row.next.empty() != row.reason.empty());
    }
  }
  CHECK_EQUAL(RequestFsm::table.size(), 276U);
  CHECK_EQUAL(BlockFsm::table.size(), 72U);
  CHECK_EQUAL(HostSlotFsm::table.size() + CopyFsm::table.size(), 32U + 56U);
}

TEST(an_event_in_the_wrong_state_is_answered_with_the_reason) {
  BlockPool pool(4, 16);
  SlotPool slots(2);
  Links links(4);
  Ranks ranks(4);
  WaitingQueue waiting(links, ranks, 256);
  waiting.welcome(0, 7);
  HoldBoard holds(links, 4, 4);
  PrefillList prefilling(links, ranks);
  DecodeList decoding(links, ranks);
  LoadList loading(links, ranks);
  HostTier tier(pool, Config{.blocks = 4}, 0);
  DraftPool drafts(2);
  Resources resources{pool, slots, waiting, holds, prefilling, decoding, loading, tier, drafts, 16};
  fsm::Slot<RequestFsm> slot(std::in_place_type<request::Waiting>, request::Waiting{waiting.enter(0)});

  CHECK_EQUAL(fsm::dispatch<RequestFsm>(slot, request::Settle{resources})->reason, request::why::not_resident);
  CHECK_EQUAL(fsm::dispatch<RequestFsm>(slot, request::Finish{resources})->reason, request::why::not_sampled);
  CHECK(std::holds_alternative<request::Waiting>(slot));  // a rejected event changes nothing
  CHECK_EQUAL(waiting.size(), 1);

  request::Residence home{slots.lease(), BlockChain(4, 4), {}};
  home.chain.fill(*pool.take(no_block));
  CHECK(!fsm::dispatch<RequestFsm>(slot, request::Admit{resources, std::move(home)}));
  CHECK_EQUAL(waiting.size() + prefilling.size() * 10, 10);
  CHECK(!fsm::dispatch<RequestFsm>(slot, request::LaunchFinal{resources, 0, 5}));
  CHECK(std::holds_alternative<request::Decoding>(slot));
  CHECK(!fsm::dispatch<RequestFsm>(slot, request::Abort{resources}));
  CHECK_EQUAL(fsm::dispatch<RequestFsm>(slot, request::Abort{resources})->reason, request::why::aborted);
  CHECK_EQUAL(pool.available(), 3);  // a launched step writes the fourth
  EXPECT_ABORT("a sequence settled while a launched step holds it",
               fsm::dispatch<RequestFsm>(slot, request::Settle{resources}));

  HashedTokens text;
  CHECK(!fsm::dispatch<RequestFsm>(slot, request::Land{resources, text, 0, 5}));
  CHECK(!fsm::dispatch<RequestFsm>(slot, request::Settle{resources}));
  CHECK(std::holds_alternative<request::Ended>(slot));
  CHECK_EQUAL(pool.free(), 4);
  CHECK_EQUAL(slots.free(), 2);
  CHECK_EQUAL(fsm::dispatch<RequestFsm>(slot, request::Abort{resources})->reason, request::why::over);
}

TEST(the_waiting_queue_keeps_rank) {
  Links links(8);
  Ranks ranks(8);
  for (std::size_t i = 0; i < 8; ++i) ranks[i] = {WaitingQueue::class_of(i < 6 ? 0 : -3), i + 1};
  WaitingQueue queue(links, ranks, 256);
  for (const SequenceIndex index : {0, 1, 2, 3, 6}) queue.welcome(index, static_cast<std::uint64_t>(index == 6));
  std::vector<WaitingQueue::Token> tokens;
  for (const SequenceIndex index : {0, 2, 3, 6}) tokens.push_back(queue.enter(index));
  tokens.push_back(queue.reenter(1));  // came back: it was submitted before 2 and 3
  std::string order;
  {
    WaitingWalk walk(queue, 16);
    for (SequenceIndex i = walk.next(); i != no_sequence; i = walk.next()) {
      order += std::to_string(i);
      walk.blocked();
    }
  }
  CHECK_EQUAL(order, std::string("0123"));
  CHECK_EQUAL(queue.mask(), 1U << 16 | 1U << 13);
  CHECK_EQUAL(WaitingQueue::class_of(-1000), 0);
  CHECK_EQUAL(WaitingQueue::class_of(1000), 31);
  for (auto& token : tokens) queue.leave(std::move(token));
  CHECK_EQUAL(queue.mask(), 0U);
  CHECK_EQUAL(queue.size(), 0);
}

CHECK_MAIN

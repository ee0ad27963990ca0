// A handle in its owner's process: pins go where the table says, and what the ledger would refuse is refused here too.
#include "check.hpp"
#include "tokenrelay/scheduler/handle.hpp"
#include "tokenrelay/scheduler/pool.hpp"

using namespace tokenrelay::scheduler;

namespace {

using Slot = fsm::Slot<HandleFsm>;

constexpr int block_tokens = 16;
std::vector<TokenId> zeros(block_tokens);

/// A pin on a block that was just filled and sealed.
SealedPin sealed_block(BlockPool& pool, std::uint64_t number) {
  return pool.seal(*pool.take(no_block), Content{{number + 1, number}, {}, zeros});
}

handle::Stake stake_of(SealedPin&& pin) {
  handle::Stake stake(1);
  stake.add(std::move(pin));
  return stake;
}

int give_back(BlockPool& pool, handle::Stake& stake) {
  int pins = 0;
  for (; !stake.empty(); ++pins) pool.unpin(stake.take());
  return pins;
}

Slot offered(std::size_t blocks) {
  Slot slot(std::in_place_type<handle::Unused>);
  CHECK(!fsm::dispatch<HandleFsm>(slot, handle::Reserve{handle::Stake(blocks)}));
  CHECK(!fsm::dispatch<HandleFsm>(slot, handle::Offer{}));
  return slot;
}

std::optional<fsm::Rejected> seal(Slot& slot, handle::Stake&& stake) {
  return fsm::dispatch<HandleFsm>(slot, handle::Seal{stake});
}

}  // namespace

TEST(a_handover_gives_every_pin_back_at_its_end) {
  BlockPool pool(4, block_tokens);
  Slot slot = offered(2);
  CHECK(!fsm::dispatch<HandleFsm>(slot, handle::Fill{}));
  CHECK(!seal(slot, stake_of(sealed_block(pool, 1))));
  CHECK(!fsm::dispatch<HandleFsm>(slot, handle::Claim{}));
  CHECK(!seal(slot, stake_of(sealed_block(pool, 2))));
  CHECK(!fsm::dispatch<HandleFsm>(slot, handle::Transfer{}));
  CHECK(!fsm::dispatch<HandleFsm>(slot, handle::Transfer{}));
  CHECK_EQUAL(std::get<handle::Transferring>(slot).stake.pins().size(), 2U);

  handle::Stake freed;
  CHECK_EQUAL(fsm::dispatch<HandleFsm>(slot, handle::Reclaim{freed})->reason, handle::why::may_read);
  CHECK_EQUAL(fsm::dispatch<HandleFsm>(slot, handle::Release{freed})->reason, handle::why::may_read);
  CHECK(freed.empty());
  CHECK(!fsm::dispatch<HandleFsm>(slot, handle::Adopt{}));
  CHECK(!fsm::dispatch<HandleFsm>(slot, handle::Release{freed}));
  CHECK(std::holds_alternative<handle::Released>(slot));
  CHECK_EQUAL(give_back(pool, freed), 2);
  CHECK_EQUAL(pool.cached(), 2);
  CHECK_EQUAL(pool.available(), 4);
}

TEST(a_quarantine_keeps_the_pins_until_an_answer_or_a_fence) {
  BlockPool pool(4, block_tokens);
  for (const bool answers : {true, false}) {
    Slot slot = offered(1);
    CHECK(!seal(slot, stake_of(sealed_block(pool, answers))));
    CHECK(!fsm::dispatch<HandleFsm>(slot, handle::Claim{}));
    CHECK(!fsm::dispatch<HandleFsm>(slot, handle::Expire{}));
    handle::Stake freed;
    CHECK_EQUAL(fsm::dispatch<HandleFsm>(slot, handle::Adopt{})->reason, handle::why::withdrawn);
    CHECK_EQUAL(fsm::dispatch<HandleFsm>(slot, handle::Reclaim{freed})->reason, handle::why::may_read);
    CHECK(freed.empty());
    CHECK_EQUAL(pool.available(), 3);
    if (answers) {
      CHECK(!fsm::dispatch<HandleFsm>(slot, handle::Acknowledge{}));
      CHECK(freed.empty());
      CHECK(!fsm::dispatch<HandleFsm>(slot, handle::Reclaim{freed}));
    } else {
      CHECK(!fsm::dispatch<HandleFsm>(slot, handle::Fence{freed}));
    }
    CHECK_EQUAL(give_back(pool, freed), 1);
    CHECK_EQUAL(pool.available(), 4);
  }
}

TEST(a_stake_is_never_dropped_with_pins) {
  BlockPool pool(1, block_tokens);
  EXPECT_ABORT("a block handle was dropped", {
    Slot slot = offered(1);
    seal(slot, stake_of(sealed_block(pool, 1)));
  });
  EXPECT_ABORT("a stake has more blocks than were reserved", {
    Slot slot = offered(0);
    seal(slot, stake_of(sealed_block(pool, 1)));
  });
}

CHECK_MAIN

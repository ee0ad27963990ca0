// The states of the request FSM, which hold what a sequence owns in them, and the events that may happen to it. What
// they lead to is in request.hpp.
#pragma once

#include <optional>
#include <utility>

#include "tokenrelay/scheduler/chain.hpp"
#include "tokenrelay/scheduler/drafts.hpp"
#include "tokenrelay/scheduler/fsm.hpp"
#include "tokenrelay/scheduler/handle.hpp"
#include "tokenrelay/scheduler/hashed_tokens.hpp"
#include "tokenrelay/scheduler/host_tier.hpp"
#include "tokenrelay/scheduler/places.hpp"
#include "tokenrelay/scheduler/pool.hpp"
#include "tokenrelay/scheduler/waiting.hpp"

namespace tokenrelay::scheduler {

/// Launched and uncommitted steps that hold a sequence. Cannot be dropped while there is one.
class Flights {
 public:
  Flights() noexcept = default;
  Flights(const Flights&) = delete;
  Flights& operator=(const Flights&) = delete;
  Flights(Flights&& other) noexcept : count_(std::exchange(other.count_, 0)) {}
  Flights& operator=(Flights&& other) noexcept {
    TR_ASSERT(count_ == 0, "launched steps were forgotten");
    count_ = std::exchange(other.count_, 0);
    return *this;
  }
  ~Flights() { TR_ASSERT(count_ == 0, "launched steps were dropped"); }

  void launch() noexcept { ++count_; }
  void land() noexcept {
    TR_ASSERT(count_ > 0, "a step was committed that was not launched");
    --count_;
  }
  [[nodiscard]] int count() const noexcept { return count_; }

 private:
  int count_ = 0;
};

/// What transitions change besides the state itself.
struct Resources {
  BlockPool& pool;
  SlotPool& slots;
  WaitingQueue& waiting;
  HoldBoard& holds;
  PrefillList& prefilling;
  DecodeList& decoding;
  LoadList& loading;
  HostTier& tier;
  DraftPool& drafts;
  int block_tokens;
};

namespace request {

/// A sequence that is resident: its row, its blocks, the launched steps that use them.
struct Residence {
  SlotPool::Lease slot;
  BlockChain chain;
  Flights flights;
  std::optional<SealedPin> tail{};  // the beginning of this block is copied by its first step, until that has landed

  void drop_tail(BlockPool& pool) noexcept {
    if (tail) pool.unpin(std::move(*std::exchange(tail, std::nullopt)));
  }
};

/// What is left of a residence when the sequence is over.
struct Estate {
  SlotPool::Lease slot;
  Remains remains;
  Flights flights;
  std::optional<SealedPin> tail{};  // as the residence's

  /// `rest`: the end of its text, which is cache (behind the full blocks).
  static Estate of(Residence&& home, BlockPool& pool, const std::optional<Content>& rest = std::nullopt) noexcept {
    return {std::move(home.slot), std::move(home.chain).abandon(pool, rest), std::move(home.flights),
            std::exchange(home.tail, std::nullopt)};
  }
  void drop_tail(BlockPool& pool) noexcept {
    if (tail) pool.unpin(std::move(*std::exchange(tail, std::nullopt)));
  }
  void land(Resources& resources, int start, int length) noexcept {
    remains.land(resources.pool, start, length, resources.block_tokens);
    flights.land();
    drop_tail(resources.pool);
  }
  void settle(Resources& resources) && noexcept {
    TR_ASSERT(flights.count() == 0, "a sequence settled while a launched step holds it");
    drop_tail(resources.pool);
    std::move(remains).release(resources.pool);
    resources.slots.give_back(std::move(slot));
  }
};

// States.
struct Waiting {  // in the queue
  static constexpr std::string_view name = "Waiting";
  WaitingQueue::Token place;
};
struct Held {  // out of the queue until a block that somebody computes is sealed or given up
  static constexpr std::string_view name = "Held";
  HoldBoard::Token place;
};
struct Prefilling {  // resident; tokens of its prompt are not yet planned
  static constexpr std::string_view name = "Prefilling";
  PrefillList::Token place;
  Residence home;
};
struct Decoding {  // resident; its whole prompt is planned, each row samples a token
  static constexpr std::string_view name = "Decoding";
  DecodeList::Token place;
  Residence home;
};
struct Drafted {  // as Decoding, but tokens that may come next are known: its next row computes them
  static constexpr std::string_view name = "Drafted";
  DecodeList::Token place;
  Residence home;
  DraftPool::Lease draft;
};
struct Verifying {  // a launched step, the only one that holds it, computes its draft
  static constexpr std::string_view name = "Verifying";
  DecodeList::Token place;
  Residence home;  // with a block for drafted tokens, if they need one
  DraftPool::Lease draft;
};
struct Preempting {  // will wait again; launched steps still give tokens
  static constexpr std::string_view name = "Preempting";
  SequenceIndex index;
  Residence home;
};
struct Importing {  // resident; a transfer may write the blocks of its prompt
  static constexpr std::string_view name = "Importing";
  SequenceIndex index;
  Residence home;
};
struct Loading {  // resident; loads from host memory may write blocks of its prefix
  static constexpr std::string_view name = "Loading";
  LoadList::Token place;
  Residence home;
  copy::Batch batch;  // for each block that is in flight in `home.chain`, in their order
};
struct Finishing {  // ended by a stop or by its length; what launched steps sample is discarded
  static constexpr std::string_view name = "Finishing";
  Estate estate;
};
struct Aborting {  // aborted; what launched steps sample is discarded
  static constexpr std::string_view name = "Aborting";
  Estate estate;
};
struct Ended {  // holds nothing
  static constexpr std::string_view name = "Ended";
  Ended() noexcept = default;
  Ended(const Ended&) = delete;
  Ended& operator=(const Ended&) = delete;
  Ended(Ended&&) noexcept = default;
  Ended& operator=(Ended&&) noexcept = default;
  ~Ended() = default;
};

// Events. What can fail was acquired before the event was made.
struct Admit {  // a slot and blocks for its whole prompt are there
  static constexpr std::string_view name = "Admit";
  Resources& resources;
  Residence home;
};
struct Hold {  // another sequence computes a block it needs
  static constexpr std::string_view name = "Hold";
  Resources& resources;
  BlockId block;
};
struct Wake {  // that block is sealed, or was given up
  static constexpr std::string_view name = "Wake";
  Resources& resources;
};
struct Launch {  // a row of it was planned: a chunk that is not the last, or a decoded token
  static constexpr std::string_view name = "Launch";
  Resources& resources;
  int start;
  int length;
  std::optional<WritableBlock> room;  // when the row begins a new block
};
struct LaunchFinal {  // the last chunk of its prompt was planned
  static constexpr std::string_view name = "LaunchFinal";
  Resources& resources;
  int start;
  int length;
};
struct Land {  // a step that holds it was committed
  static constexpr std::string_view name = "Land";
  Resources& resources;
  HashedTokens& text;
  int start;
  int length;
};
struct Propose {  // somebody guesses its next tokens
  static constexpr std::string_view name = "Propose";
  DraftPool::Lease draft;
};
struct Confirm {  // a launched step sampled the first token of its draft; the others are still to come
  static constexpr std::string_view name = "Confirm";
  Resources& resources;
};
struct Drop {  // its draft was refuted, is used up, or has no room
  static constexpr std::string_view name = "Drop";
  Resources& resources;
};
struct Speculate {  // a row of it was planned that computes a token and its draft; no launched step holds it
  static constexpr std::string_view name = "Speculate";
  Resources& resources;
  int start;
  int length;
  std::optional<WritableBlock> room;  // when the row begins a new block
};
struct Verify {  // that step was committed: the KV of its first `kept` tokens stands
  static constexpr std::string_view name = "Verify";
  Resources& resources;
  HashedTokens& text;
  int start;
  int length;
  int kept;
};
struct Finish {  // it sampled a stop token, or reached its length
  static constexpr std::string_view name = "Finish";
  Resources& resources;
  std::optional<Content> rest{};  // what its last block holds, if that is not full and is to be cache
};
struct Preempt {  // its blocks are needed by a sequence of better rank
  static constexpr std::string_view name = "Preempt";
  Resources& resources;
};
struct Abort {  // the client, or whoever speaks for it, gave up
  static constexpr std::string_view name = "Abort";
  Resources& resources;
};
struct Import {  // a slot and blocks for its whole prompt are there, and a transfer will write them
  static constexpr std::string_view name = "Import";
  Resources& resources;
  Residence home;
};
struct Imported {  // the transfer has ended, and all that it read was validated
  static constexpr std::string_view name = "Imported";
  Resources& resources;
  HashedTokens& text;
  int start;
  int length;
};
struct Renounce {  // the transfer has ended, and what it wrote is worth nothing
  static constexpr std::string_view name = "Renounce";
  Resources& resources;
  int start;
  int length;
};
struct Load {  // a slot and blocks for its whole prompt are there, and loads will write those after its cached ones
  static constexpr std::string_view name = "Load";
  Resources& resources;
  Residence home;
  copy::Batch batch;
};
struct Arrive {  // the next block of its prefix was loaded
  static constexpr std::string_view name = "Arrive";
  Resources& resources;
  HashedTokens& text;
  int start;
};
struct Loaded {  // all its loads have ended; what did not arrive, it computes
  static constexpr std::string_view name = "Loaded";
  Resources& resources;
};
struct Expire {  // one of its loads is past its deadline
  static constexpr std::string_view name = "Expire";
  Resources& resources;
};
struct HandOver {  // it sampled its first token, and a peer goes on from its KV
  static constexpr std::string_view name = "HandOver";
  Resources& resources;
  handle::Stake& stake;  // gets a pin on the partial last block; it has those on the full ones
};
struct Settle {  // no launched step holds it any more
  static constexpr std::string_view name = "Settle";
  Resources& resources;
};

}  // namespace request

}  // namespace tokenrelay::scheduler

// The request FSM: what a sequence is doing, as move-only states that hold what it owns.
//
//     Waiting <-> Held        Waiting -> Prefilling -> Decoding -> Finishing -> Ended
//     Waiting <-> Loading -> Prefilling
//        ^---- Preempting <------/------------/  \-> Aborting -> Ended
//
// A sequence whose KV comes from a peer goes Waiting -> Importing -> Decoding: a transfer in flight holds it as a
// launched step would. One whose prefix is in host memory goes Waiting -> Loading -> Prefilling; when it gives up
// before its loads have ended, the blocks that they write stay with them (copy.hpp).
//
// A launched step holds its sequences: Preempting, Finishing and Aborting are sequences that are over but for steps in
// flight. What they keep is given back by `Settle`, after the commit of the last launched step that holds them.
#pragma once

#include <array>
#include <optional>
#include <utility>

#include "tokenrelay/scheduler/chain.hpp"
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
  int block_tokens;
};

namespace request {

/// A sequence that is resident: its row, its blocks, the launched steps that use them.
struct Residence {
  SlotPool::Lease slot;
  BlockChain chain;
  Flights flights;
};

/// What is left of a residence when the sequence is over.
struct Estate {
  SlotPool::Lease slot;
  Remains remains;
  Flights flights;

  static Estate of(Residence&& home, BlockPool& pool) noexcept {
    return {std::move(home.slot), std::move(home.chain).abandon(pool), std::move(home.flights)};
  }
  void land(Resources& resources, int start, int length) noexcept {
    remains.land(resources.pool, start, length, resources.block_tokens);
    flights.land();
  }
  void settle(Resources& resources) && noexcept {
    TR_ASSERT(flights.count() == 0, "a sequence settled while a launched step holds it");
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
struct Finish {  // it sampled a stop token, or reached its length
  static constexpr std::string_view name = "Finish";
  Resources& resources;
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

inline Prefilling on(Waiting&& state, Admit&& event) noexcept {
  Resources& r = event.resources;
  return {r.prefilling.enter(r.waiting.leave(std::move(state.place))), std::move(event.home)};
}
inline Held on(Waiting&& state, Hold&& event) noexcept {
  Resources& r = event.resources;
  r.pool.watch(event.block);
  return {r.holds.enter(r.waiting.leave(std::move(state.place)), event.block)};
}
inline Ended on(Waiting&& state, Abort&& event) noexcept {
  event.resources.waiting.leave(std::move(state.place));
  return {};
}
inline Waiting on(Held&& state, Wake&& event) noexcept {
  Resources& r = event.resources;
  return {r.waiting.reenter(r.holds.leave(std::move(state.place)))};
}
inline Ended on(Held&& state, Abort&& event) noexcept {
  event.resources.holds.leave(std::move(state.place));
  return {};
}

inline void launch(Residence& home, Resources& r, int start, int length) noexcept {
  home.chain.launch(r.pool.records(), start, length, r.block_tokens);
  home.flights.launch();
}
inline Prefilling on(Prefilling&& state, Launch&& event) noexcept {
  TR_ASSERT(!event.room, "a prompt's blocks are all there since its admission");
  launch(state.home, event.resources, event.start, event.length);
  return std::move(state);
}
inline Decoding on(Prefilling&& state, LaunchFinal&& event) noexcept {
  Resources& r = event.resources;
  launch(state.home, r, event.start, event.length);
  return {r.decoding.enter(r.prefilling.leave(std::move(state.place))), std::move(state.home)};
}
inline Decoding on(Decoding&& state, Launch&& event) noexcept {
  if (event.room) state.home.chain.append(std::move(*event.room));
  launch(state.home, event.resources, event.start, event.length);
  return std::move(state);
}

inline void land(Residence& home, Land& event) noexcept {
  home.chain.land(event.resources.pool, event.start, event.length, event.resources.block_tokens, event.text);
  home.flights.land();
}
inline Prefilling on(Prefilling&& state, Land&& event) noexcept {
  land(state.home, event);
  return std::move(state);
}
inline Decoding on(Decoding&& state, Land&& event) noexcept {
  land(state.home, event);
  return std::move(state);
}
inline Preempting on(Preempting&& state, Land&& event) noexcept {
  land(state.home, event);
  return std::move(state);
}
inline Finishing on(Finishing&& state, Land&& event) noexcept {
  state.estate.land(event.resources, event.start, event.length);
  return std::move(state);
}
inline Aborting on(Aborting&& state, Land&& event) noexcept {
  state.estate.land(event.resources, event.start, event.length);
  return std::move(state);
}

inline Finishing on(Decoding&& state, Finish&& event) noexcept {
  event.resources.decoding.leave(std::move(state.place));
  return {Estate::of(std::move(state.home), event.resources.pool)};
}
inline Finishing on(Preempting&& state, Finish&& event) noexcept {
  return {Estate::of(std::move(state.home), event.resources.pool)};
}
inline Preempting on(Prefilling&& state, Preempt&& event) noexcept {
  const SequenceIndex index = event.resources.prefilling.leave(std::move(state.place));
  state.home.chain.trim(event.resources.pool);
  return {index, std::move(state.home)};
}
inline Preempting on(Decoding&& state, Preempt&& event) noexcept {
  const SequenceIndex index = event.resources.decoding.leave(std::move(state.place));
  state.home.chain.trim(event.resources.pool);
  return {index, std::move(state.home)};
}
inline Aborting on(Prefilling&& state, Abort&& event) noexcept {
  event.resources.prefilling.leave(std::move(state.place));
  return {Estate::of(std::move(state.home), event.resources.pool)};
}
inline Aborting on(Decoding&& state, Abort&& event) noexcept {
  event.resources.decoding.leave(std::move(state.place));
  return {Estate::of(std::move(state.home), event.resources.pool)};
}
inline Aborting on(Preempting&& state, Abort&& event) noexcept {
  return {Estate::of(std::move(state.home), event.resources.pool)};
}
inline Waiting on(Preempting&& state, Settle&& event) noexcept {
  Resources& r = event.resources;
  Estate::of(std::move(state.home), r.pool).settle(r);
  return {r.waiting.reenter(state.index)};
}
inline Importing on(Waiting&& state, Import&& event) noexcept {
  return {event.resources.waiting.leave(std::move(state.place)), std::move(event.home)};
}
inline Decoding on(Importing&& state, Imported&& event) noexcept {
  Resources& r = event.resources;
  state.home.chain.land(r.pool, event.start, event.length, r.block_tokens, event.text);
  state.home.flights.land();
  return {r.decoding.enter(state.index), std::move(state.home)};
}
inline Waiting on(Importing&& state, Renounce&& event) noexcept {
  Resources& r = event.resources;
  Estate estate = Estate::of(std::move(state.home), r.pool);
  estate.land(r, event.start, event.length);
  std::move(estate).settle(r);
  return {r.waiting.reenter(state.index)};
}
inline Aborting on(Importing&& state, Abort&& event) noexcept {
  return {Estate::of(std::move(state.home), event.resources.pool)};
}
/// Its blocks go: those that loads may still write stay with these until they have ended.
inline void give_up(Residence&& home, copy::Batch&& batch, Resources& r) noexcept {
  TR_ASSERT(home.flights.count() == 0, "a launched step holds a sequence that loads its prefix");
  Remains remains = std::move(home.chain).abandon(r.pool);
  while (!batch.empty()) r.tier.orphan(batch.pop_front(), remains.hand_on());
  std::move(remains).release(r.pool);
  r.slots.give_back(std::move(home.slot));
}
inline Loading on(Waiting&& state, Load&& event) noexcept {
  Resources& r = event.resources;
  return {r.loading.enter(r.waiting.leave(std::move(state.place))), std::move(event.home), std::move(event.batch)};
}
inline Loading on(Loading&& state, Arrive&& event) noexcept {
  Resources& r = event.resources;
  r.tier.collect(state.batch.pop_front());
  state.home.chain.land(r.pool, event.start, r.block_tokens, r.block_tokens, event.text);
  return std::move(state);
}
inline Prefilling on(Loading&& state, Loaded&& event) noexcept {
  Resources& r = event.resources;
  while (!state.batch.empty()) r.tier.collect(state.batch.pop_front());
  state.home.chain.unlaunch(r.pool.records());
  return {r.prefilling.enter(r.loading.leave(std::move(state.place))), std::move(state.home)};
}
inline Waiting on(Loading&& state, Expire&& event) noexcept {
  Resources& r = event.resources;
  const SequenceIndex index = r.loading.leave(std::move(state.place));
  give_up(std::move(state.home), std::move(state.batch), r);
  return {r.waiting.reenter(index)};
}
inline Waiting on(Loading&& state, Preempt&& event) noexcept {
  Resources& r = event.resources;
  const SequenceIndex index = r.loading.leave(std::move(state.place));
  give_up(std::move(state.home), std::move(state.batch), r);
  return {r.waiting.reenter(index)};
}
inline Ended on(Loading&& state, Abort&& event) noexcept {
  event.resources.loading.leave(std::move(state.place));
  give_up(std::move(state.home), std::move(state.batch), event.resources);
  return {};
}
inline Finishing hand_over(Residence&& home, HandOver& event) noexcept {
  BlockPool& pool = event.resources.pool;
  if (std::optional<SealedPin> rest = home.chain.seal_rest(pool)) event.stake.add(std::move(*rest));
  return {Estate::of(std::move(home), pool)};
}
inline Finishing on(Decoding&& state, HandOver&& event) noexcept {
  event.resources.decoding.leave(std::move(state.place));
  return hand_over(std::move(state.home), event);
}
inline Finishing on(Preempting&& state, HandOver&& event) noexcept { return hand_over(std::move(state.home), event); }
inline Ended on(Finishing&& state, Settle&& event) noexcept {
  std::move(state.estate).settle(event.resources);
  return {};
}
inline Ended on(Aborting&& state, Settle&& event) noexcept {
  std::move(state.estate).settle(event.resources);
  return {};
}

}  // namespace request

}  // namespace tokenrelay::scheduler

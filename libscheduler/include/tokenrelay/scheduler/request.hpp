// The request FSM: what a sequence is doing, as move-only states that hold what it owns.
//
//     Waiting <-> Held        Waiting -> Prefilling -> Decoding -> Finishing -> Ended
//        ^---- Preempting <------/------------/  \-> Aborting -> Ended
//
// A launched step holds its sequences: Preempting, Finishing and Aborting are sequences that are over but for steps in
// flight. What they keep is given back by `Settle`, after the commit of the last launched step that holds them.
#pragma once

#include <array>
#include <optional>
#include <utility>

#include "tokenrelay/scheduler/chain.hpp"
#include "tokenrelay/scheduler/fsm.hpp"
#include "tokenrelay/scheduler/hashed_tokens.hpp"
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
inline Ended on(Finishing&& state, Settle&& event) noexcept {
  std::move(state.estate).settle(event.resources);
  return {};
}
inline Ended on(Aborting&& state, Settle&& event) noexcept {
  std::move(state.estate).settle(event.resources);
  return {};
}

namespace why {
inline constexpr std::string_view resident = "it holds a slot already";
inline constexpr std::string_view not_resident = "it holds no slot";
inline constexpr std::string_view not_held = "it waits for no block";
inline constexpr std::string_view held = "it waits for a block that is being computed";
inline constexpr std::string_view no_more_rows = "it is over; no row of it is planned any more";
inline constexpr std::string_view leaving = "it gives its slot up; no row of it is planned any more";
inline constexpr std::string_view not_launched = "no launched step holds it";
inline constexpr std::string_view not_sampled = "nothing of it was sampled";
inline constexpr std::string_view keeps = "it runs; it keeps what it holds";
inline constexpr std::string_view planned = "its whole prompt is planned already";
inline constexpr std::string_view over = "it ended already";
inline constexpr std::string_view aborted = "it was aborted already";
inline constexpr std::string_view preempted = "it was preempted already";
}  // namespace why

inline constexpr std::array table{
    fsm::to<Waiting, Admit, Prefilling>(),
    fsm::to<Waiting, Hold, Held>(),
    fsm::reject<Waiting, Wake>(why::not_held),
    fsm::reject<Waiting, Launch>(why::not_resident),
    fsm::reject<Waiting, LaunchFinal>(why::not_resident),
    fsm::reject<Waiting, Land>(why::not_launched),
    fsm::reject<Waiting, Finish>(why::not_sampled),
    fsm::reject<Waiting, Preempt>(why::not_resident),
    fsm::to<Waiting, Abort, Ended>(),
    fsm::reject<Waiting, Settle>(why::not_resident),

    fsm::reject<Held, Admit>(why::held),
    fsm::reject<Held, Hold>(why::held),
    fsm::to<Held, Wake, Waiting>(),
    fsm::reject<Held, Launch>(why::not_resident),
    fsm::reject<Held, LaunchFinal>(why::not_resident),
    fsm::reject<Held, Land>(why::not_launched),
    fsm::reject<Held, Finish>(why::not_sampled),
    fsm::reject<Held, Preempt>(why::not_resident),
    fsm::to<Held, Abort, Ended>(),
    fsm::reject<Held, Settle>(why::not_resident),

    fsm::reject<Prefilling, Admit>(why::resident),
    fsm::reject<Prefilling, Hold>(why::resident),
    fsm::reject<Prefilling, Wake>(why::not_held),
    fsm::to<Prefilling, Launch, Prefilling>(),
    fsm::to<Prefilling, LaunchFinal, Decoding>(),
    fsm::to<Prefilling, Land, Prefilling>(),
    fsm::reject<Prefilling, Finish>(why::not_sampled),
    fsm::to<Prefilling, Preempt, Preempting>(),
    fsm::to<Prefilling, Abort, Aborting>(),
    fsm::reject<Prefilling, Settle>(why::keeps),

    fsm::reject<Decoding, Admit>(why::resident),
    fsm::reject<Decoding, Hold>(why::resident),
    fsm::reject<Decoding, Wake>(why::not_held),
    fsm::to<Decoding, Launch, Decoding>(),
    fsm::reject<Decoding, LaunchFinal>(why::planned),
    fsm::to<Decoding, Land, Decoding>(),
    fsm::to<Decoding, Finish, Finishing>(),
    fsm::to<Decoding, Preempt, Preempting>(),
    fsm::to<Decoding, Abort, Aborting>(),
    fsm::reject<Decoding, Settle>(why::keeps),

    fsm::reject<Preempting, Admit>(why::resident),
    fsm::reject<Preempting, Hold>(why::resident),
    fsm::reject<Preempting, Wake>(why::not_held),
    fsm::reject<Preempting, Launch>(why::leaving),
    fsm::reject<Preempting, LaunchFinal>(why::leaving),
    fsm::to<Preempting, Land, Preempting>(),
    fsm::to<Preempting, Finish, Finishing>(),
    fsm::reject<Preempting, Preempt>(why::preempted),
    fsm::to<Preempting, Abort, Aborting>(),
    fsm::to<Preempting, Settle, Waiting>(),

    fsm::reject<Finishing, Admit>(why::over),
    fsm::reject<Finishing, Hold>(why::over),
    fsm::reject<Finishing, Wake>(why::over),
    fsm::reject<Finishing, Launch>(why::no_more_rows),
    fsm::reject<Finishing, LaunchFinal>(why::no_more_rows),
    fsm::to<Finishing, Land, Finishing>(),
    fsm::reject<Finishing, Finish>(why::over),
    fsm::reject<Finishing, Preempt>(why::over),
    fsm::reject<Finishing, Abort>(why::over),
    fsm::to<Finishing, Settle, Ended>(),

    fsm::reject<Aborting, Admit>(why::aborted),
    fsm::reject<Aborting, Hold>(why::aborted),
    fsm::reject<Aborting, Wake>(why::aborted),
    fsm::reject<Aborting, Launch>(why::no_more_rows),
    fsm::reject<Aborting, LaunchFinal>(why::no_more_rows),
    fsm::to<Aborting, Land, Aborting>(),
    fsm::reject<Aborting, Finish>(why::aborted),
    fsm::reject<Aborting, Preempt>(why::aborted),
    fsm::reject<Aborting, Abort>(why::aborted),
    fsm::to<Aborting, Settle, Ended>(),

    fsm::reject<Ended, Admit>(why::over),
    fsm::reject<Ended, Hold>(why::over),
    fsm::reject<Ended, Wake>(why::over),
    fsm::reject<Ended, Launch>(why::over),
    fsm::reject<Ended, LaunchFinal>(why::over),
    fsm::reject<Ended, Land>(why::over),
    fsm::reject<Ended, Finish>(why::over),
    fsm::reject<Ended, Preempt>(why::over),
    fsm::reject<Ended, Abort>(why::over),
    fsm::reject<Ended, Settle>(why::over),
};

}  // namespace request

struct RequestFsm {
  static constexpr std::string_view name = "request";
  static constexpr std::string_view initial = "Waiting";
  using States = fsm::Types<request::Waiting, request::Held, request::Prefilling, request::Decoding,
                            request::Preempting, request::Finishing, request::Aborting, request::Ended>;
  using Events = fsm::Types<request::Admit, request::Hold, request::Wake, request::Launch, request::LaunchFinal,
                            request::Land, request::Finish, request::Preempt, request::Abort, request::Settle>;
  static constexpr std::span<const fsm::Row> table{request::table};
};
static_assert(fsm::verified<RequestFsm>());

}  // namespace tokenrelay::scheduler

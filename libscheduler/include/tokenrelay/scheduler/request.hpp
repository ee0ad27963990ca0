// The request FSM: what a sequence is doing, as move-only states that hold what it owns.
//
//     Waiting <-> Held        Waiting -> Prefilling -> Decoding -> Finishing -> Ended
//     Waiting <-> Loading -> Prefilling
//        ^---- Preempting <------/------------/  \-> Aborting -> Ended
//
// A sequence that somebody drafts for goes Decoding -> Drafted -> Verifying -> Decoding: it waits for its launched
// steps, then one step computes the draft, whose blocks land with what was accepted of it.
//
// A sequence whose KV comes from a peer goes Waiting -> Importing -> Decoding: a transfer in flight holds it as a
// launched step would. One whose prefix is in host memory goes Waiting -> Loading -> Prefilling; when it gives up
// before its loads have ended, the blocks that they write stay with them (copy.hpp).
//
// A launched step holds its sequences: Preempting, Finishing and Aborting are sequences that are over but for steps in
// flight. What they keep is given back by `Settle`, after the commit of the last launched step that holds them.
#pragma once

#include <utility>

#include "tokenrelay/scheduler/request_states.hpp"

namespace tokenrelay::scheduler {

namespace request {

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
  home.drop_tail(event.resources.pool);
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

inline Drafted on(Decoding&& state, Propose&& event) noexcept {
  return {std::move(state.place), std::move(state.home), std::move(event.draft)};
}
inline Drafted on(Drafted&& state, Confirm&& event) noexcept {
  event.resources.drafts.advance(state.draft);
  return std::move(state);
}
inline Decoding on(Drafted&& state, Drop&& event) noexcept {
  event.resources.drafts.give_back(std::move(state.draft));
  return {std::move(state.place), std::move(state.home)};
}
inline Drafted on(Drafted&& state, Land&& event) noexcept {
  land(state.home, event);
  return std::move(state);
}
inline Verifying on(Drafted&& state, Speculate&& event) noexcept {
  TR_ASSERT(state.home.flights.count() == 0, "a draft is computed when all tokens before it are known");
  if (event.room) state.home.chain.reserve(std::move(*event.room));
  launch(state.home, event.resources, event.start, event.length);
  return {std::move(state.place), std::move(state.home), std::move(state.draft)};
}
inline void verify(Residence& home, Verify& event) noexcept {
  Resources& r = event.resources;
  home.chain.land_draft(r.pool, event.start, event.length, event.kept, r.block_tokens, event.text);
  home.flights.land();
}
inline Decoding on(Verifying&& state, Verify&& event) noexcept {
  verify(state.home, event);
  event.resources.drafts.give_back(std::move(state.draft));
  return {std::move(state.place), std::move(state.home)};
}
inline Preempting on(Preempting&& state, Verify&& event) noexcept {
  verify(state.home, event);
  return std::move(state);
}
inline Finishing on(Finishing&& state, Verify&& event) noexcept {
  state.estate.land(event.resources, event.start, event.length);
  return std::move(state);
}
inline Aborting on(Aborting&& state, Verify&& event) noexcept {
  state.estate.land(event.resources, event.start, event.length);
  return std::move(state);
}

inline Finishing on(Drafted&& state, Finish&& event) noexcept {
  Resources& r = event.resources;
  r.decoding.leave(std::move(state.place));
  r.drafts.give_back(std::move(state.draft));
  return {Estate::of(std::move(state.home), r.pool, event.rest)};
}
inline Finishing on(Decoding&& state, Finish&& event) noexcept {
  event.resources.decoding.leave(std::move(state.place));
  return {Estate::of(std::move(state.home), event.resources.pool, event.rest)};
}
inline Finishing on(Preempting&& state, Finish&& event) noexcept {
  return {Estate::of(std::move(state.home), event.resources.pool, event.rest)};
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
/// Without its draft: the step that computes it still gives one token.
template <class State>
inline Preempting preempt_drafted(State&& state, Resources& r) noexcept {
  const SequenceIndex index = r.decoding.leave(std::move(state.place));
  r.drafts.give_back(std::move(state.draft));
  state.home.chain.trim(r.pool);
  return {index, std::move(state.home)};
}
inline Preempting on(Drafted&& state, Preempt&& event) noexcept {
  return preempt_drafted(std::move(state), event.resources);
}
inline Preempting on(Verifying&& state, Preempt&& event) noexcept {
  return preempt_drafted(std::move(state), event.resources);
}
template <class State>
inline Aborting abort_drafted(State&& state, Resources& r) noexcept {
  r.decoding.leave(std::move(state.place));
  r.drafts.give_back(std::move(state.draft));
  return {Estate::of(std::move(state.home), r.pool)};
}
inline Aborting on(Drafted&& state, Abort&& event) noexcept { return abort_drafted(std::move(state), event.resources); }
inline Aborting on(Verifying&& state, Abort&& event) noexcept {
  return abort_drafted(std::move(state), event.resources);
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

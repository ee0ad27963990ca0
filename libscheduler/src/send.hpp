// Internal: an event that the scheduler itself sends must be a transition.
#pragma once

#include "tokenrelay/scheduler/scheduler.hpp"

namespace tokenrelay::scheduler {

template <class Event>
void Scheduler::send(Sequence& sequence, Event&& event) noexcept {
  const auto rejected = fsm::dispatch<RequestFsm>(sequence.state, std::forward<Event>(event));
  TR_ASSERT(!rejected, "the scheduler sent an event that the request's state rejects");
}

}  // namespace tokenrelay::scheduler

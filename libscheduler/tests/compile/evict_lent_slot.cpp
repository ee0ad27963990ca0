// A load may read a slot that is lent: nobody takes the room.
// error: no matching function for call to .on\(
// also: Lent.*Evict
#include "tokenrelay/scheduler/host_slot.hpp"
using namespace tokenrelay::scheduler;
#ifdef MUST_NOT_COMPILE
auto go(host::Lent&& state, host::Evict&& event) { return on(std::move(state), std::move(event)); }
#else
auto go(host::Kept&& state, host::Evict&& event) { return on(std::move(state), std::move(event)); }
#endif

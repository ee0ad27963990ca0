// A peer may be reading what was claimed: its owner cannot take it back.
// error: (no matching function for call to .on\(|use of deleted function|no match)
// also: Claimed.*Reclaim
#include "tokenrelay/scheduler/handle.hpp"
using namespace tokenrelay::scheduler;
#ifdef MUST_NOT_COMPILE
auto go(handle::Claimed&& state, handle::Reclaim&& event) { return on(std::move(state), std::move(event)); }
#else
auto go(handle::Returned&& state, handle::Reclaim&& event) { return on(std::move(state), std::move(event)); }
#endif

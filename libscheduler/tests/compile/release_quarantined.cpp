// A quarantine ends by an answer or by a fence.
// error: no matching function for call to .on\(
// also: Quarantined.*Release
#include "tokenrelay/scheduler/handle.hpp"
using namespace tokenrelay::scheduler;
#ifdef MUST_NOT_COMPILE
auto go(handle::Quarantined&& state, handle::Release&& event) { return on(std::move(state), std::move(event)); }
#else
auto go(handle::Quarantined&& state, handle::Fence&& event) { return on(std::move(state), std::move(event)); }
#endif

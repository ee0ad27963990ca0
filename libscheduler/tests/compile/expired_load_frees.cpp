// A deadline that passes frees nothing: a load that a sequence waits for becomes an orphan first, and keeps its block.
// error: no matching function for call to .on\(
// also: Loading.*Expire
#include "tokenrelay/scheduler/copy.hpp"
using namespace tokenrelay::scheduler;
#ifdef MUST_NOT_COMPILE
auto go(copy::Loading&& state, copy::Expire&& event) { return on(std::move(state), std::move(event)); }
#else
copy::OrphanedLate go(copy::Orphaned&& state, copy::Expire&& event) { return on(std::move(state), std::move(event)); }
#endif

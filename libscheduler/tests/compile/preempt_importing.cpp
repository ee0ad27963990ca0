// A transfer may write the blocks of an importing sequence: nobody takes them from it.
// error: no matching function for call to .on\(
// also: Importing.*Preempt
#include "tokenrelay/scheduler/request.hpp"
using namespace tokenrelay::scheduler;
#ifdef MUST_NOT_COMPILE
auto go(request::Importing&& state, request::Preempt&& event) { return on(std::move(state), std::move(event)); }
#else
auto go(request::Decoding&& state, request::Preempt&& event) { return on(std::move(state), std::move(event)); }
#endif

// A waiting sequence has no row to plan.
// error: no matching function for call to .on\(
// also: Waiting.*Launch
#include "tokenrelay/scheduler/request.hpp"
using namespace tokenrelay::scheduler;
#ifdef MUST_NOT_COMPILE
auto go(request::Waiting&& state, request::Launch&& event) { return on(std::move(state), std::move(event)); }
#else
auto go(request::Decoding&& state, request::Launch&& event) { return on(std::move(state), std::move(event)); }
#endif

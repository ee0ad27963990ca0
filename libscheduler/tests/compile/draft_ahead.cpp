// What a draft gives decides on the next row: nothing is planned for a sequence whose draft a launched step computes.
// error: no matching function for call to .on\(
// also: Verifying.*Launch
#include "tokenrelay/scheduler/request.hpp"
using namespace tokenrelay::scheduler;
#ifdef MUST_NOT_COMPILE
auto go(request::Verifying&& state, request::Launch&& event) { return on(std::move(state), std::move(event)); }
#else
auto go(request::Decoding&& state, request::Launch&& event) { return on(std::move(state), std::move(event)); }
#endif

// Blocks of a draft land with what was accepted of it: a commit that does not say so would seal rejected tokens.
// error: no matching function for call to .on\(
// also: Verifying.*Land
#include "tokenrelay/scheduler/request.hpp"
using namespace tokenrelay::scheduler;
#ifdef MUST_NOT_COMPILE
auto go(request::Verifying&& state, request::Land&& event) { return on(std::move(state), std::move(event)); }
#else
auto go(request::Verifying&& state, request::Verify&& event) { return on(std::move(state), std::move(event)); }
#endif

// No step reads a prefix that is being loaded.
// error: no matching function for call to .on\(
// also: Loading.*Launch
#include "tokenrelay/scheduler/request.hpp"
using namespace tokenrelay::scheduler;
#ifdef MUST_NOT_COMPILE
auto go(request::Loading&& state, request::Launch&& event) { return on(std::move(state), std::move(event)); }
#else
auto go(request::Prefilling&& state, request::Launch&& event) { return on(std::move(state), std::move(event)); }
#endif

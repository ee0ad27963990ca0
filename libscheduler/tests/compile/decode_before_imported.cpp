// No step reads KV that a transfer has not brought yet.
// error: no matching function for call to .on\(
// also: Importing.*Launch
#include "tokenrelay/scheduler/request.hpp"
using namespace tokenrelay::scheduler;
#ifdef MUST_NOT_COMPILE
auto go(request::Importing&& state, request::Launch&& event) { return on(std::move(state), std::move(event)); }
#else
auto go(request::Decoding&& state, request::Launch&& event) { return on(std::move(state), std::move(event)); }
#endif

// The pins of a handle are counted once.
// error: use of deleted function
// also: Stake
#include "tokenrelay/scheduler/handle.hpp"
using namespace tokenrelay::scheduler;
void twin(handle::Stake& from) {
#ifdef MUST_NOT_COMPILE
  handle::Stake copy = from;
#else
  handle::Stake moved = std::move(from);
#endif
}

// A pin counts as one reader: a copy would be a reader that nobody counted.
// error: (use of deleted function|deleted copy assignment|overload resolution selected deleted)
// also: SealedPin
#include "tokenrelay/scheduler/block.hpp"
using namespace tokenrelay::scheduler;
void twin(SealedPin& to, SealedPin& from) {
#ifdef MUST_NOT_COMPILE
  to = from;
#else
  to = std::move(from);
#endif
}

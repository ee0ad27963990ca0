// A share of a host slot counts as one reader: a copy would be a reader that nobody counted.
// error: (use of deleted function|deleted copy assignment|overload resolution selected deleted)
// also: Loan
#include "tokenrelay/scheduler/host_slot.hpp"
using namespace tokenrelay::scheduler;
void twin(host::Loan& to, host::Loan& from) {
#ifdef MUST_NOT_COMPILE
  to = from;
#else
  to = std::move(from);
#endif
}

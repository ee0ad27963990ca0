// A transition consumes its state: one that is still named elsewhere does not bind.
// error: (no matching function for call to .on\(|cannot bind rvalue reference)
// also: (cannot bind|no known conversion|expects an rvalue)
#include "tokenrelay/scheduler/block.hpp"
using namespace tokenrelay::scheduler;
InFlightBlock go(WritableBlock& block, block::Records& records) {
#ifdef MUST_NOT_COMPILE
  return on(block, block::Launch{records});
#else
  return on(std::move(block), block::Launch{records});
#endif
}

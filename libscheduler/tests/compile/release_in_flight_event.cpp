// The same by the transition itself: no overload takes an InFlight block and Release.
// error: no matching function for call to .on\(
// also: InFlight.*Release
#include "tokenrelay/scheduler/block.hpp"
using namespace tokenrelay::scheduler;
#ifdef MUST_NOT_COMPILE
block::Free give_back(InFlightBlock&& block, block::Records& records) {
  return on(std::move(block), block::Release{records});
}
#else
block::Free give_back(WritableBlock&& block, block::Records& records) {
  return on(std::move(block), block::Release{records});
}
#endif

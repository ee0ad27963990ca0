// A handle is the right to a block: there is one.
// error: (use of deleted function|call to (implicitly-)?deleted|deleted constructor)
// also: Handle\(const
#include "tokenrelay/scheduler/block.hpp"
using namespace tokenrelay::scheduler;
WritableBlock twin(WritableBlock& block) {
#ifdef MUST_NOT_COMPILE
  return WritableBlock(block);
#else
  return WritableBlock(std::move(block));
#endif
}

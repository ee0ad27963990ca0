// What a sequence still writes is nobody else's to read.
// error: only a Sealed block may be read
#include "tokenrelay/scheduler/block.hpp"
using namespace tokenrelay::scheduler;
#ifdef MUST_NOT_COMPILE
BlockId descriptor(const WritableBlock& block) { return block::read(block); }
#else
BlockId descriptor(const SealedPin& block) { return block::read(block); }
#endif

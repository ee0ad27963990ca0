// A block that a launched step writes cannot be given back, only abandoned.
// error: (cannot convert|no viable conversion|cannot bind)
// also: InFlight.* to .*Writable
#include "tokenrelay/scheduler/pool.hpp"
using namespace tokenrelay::scheduler;
#ifdef MUST_NOT_COMPILE
void give_back(BlockPool& pool, InFlightBlock&& block) { pool.release(std::move(block)); }
#else
void give_back(BlockPool& pool, WritableBlock&& block) { pool.release(std::move(block)); }
#endif

// A block that nobody takes would be dropped.
// error: (ignoring return value|nodiscard)
// also: take
#include "tokenrelay/scheduler/pool.hpp"
using namespace tokenrelay::scheduler;
void get(BlockPool& pool) {
#ifdef MUST_NOT_COMPILE
  pool.take(no_block);
#else
  if (auto block = pool.take(no_block)) pool.release(std::move(*block));
#endif
}

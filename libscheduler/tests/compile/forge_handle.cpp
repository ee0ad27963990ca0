// A handle comes from the pool or from a transition, not from a number.
// error: (constexpr )?.*Key::Key\(\).*(private|protected)|private constructor
#include "tokenrelay/scheduler/pool.hpp"
using namespace tokenrelay::scheduler;
std::optional<WritableBlock> get(BlockPool& pool) {
#ifdef MUST_NOT_COMPILE
  (void)pool;
  return WritableBlock(block::Key{}, 3);
#else
  return pool.take(no_block);
#endif
}

// What ends a chain of blocks is &&-qualified: the chain is gone afterwards.
// error: (discards qualifiers|'this' argument|cannot bind)
// also: abandon
#include "tokenrelay/scheduler/chain.hpp"
using namespace tokenrelay::scheduler;
Remains end(BlockChain& chain, BlockPool& pool) {
#ifdef MUST_NOT_COMPILE
  return chain.abandon(pool);
#else
  return std::move(chain).abandon(pool);
#endif
}

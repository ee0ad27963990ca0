// What ends a chain of blocks is &&-qualified: the chain is gone afterwards.
// error: (passing .* as .this. argument discards qualifiers|no matching member function|'this' argument|cannot be
// called|cannot bind|discards qualifiers) also: abandon
#include "tokenrelay/scheduler/chain.hpp"
using namespace tokenrelay::scheduler;
Remains end(BlockChain& chain, BlockPool& pool) {
#ifdef MUST_NOT_COMPILE
  return chain.abandon(pool);
#else
  return std::move(chain).abandon(pool);
#endif
}

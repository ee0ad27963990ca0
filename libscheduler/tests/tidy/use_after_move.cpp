// Seeded: clang-tidy must refuse this file (tests/libscheduler/test_clang_tidy.py). It is compiled by nothing else.
#include "tokenrelay/scheduler/pool.hpp"

using namespace tokenrelay::scheduler;

void launched_twice(WritableBlock&& block, block::Records& records) {
  InFlightBlock first = on(std::move(block), block::Launch{records});
#ifndef CORRECT
  InFlightBlock second = on(std::move(block), block::Launch{records});
  (void)block::Access::dissolve(std::move(second));
#endif
  (void)block::Access::dissolve(std::move(first));
}

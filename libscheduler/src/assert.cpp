#include "tokenrelay/scheduler/assert.hpp"

#include <cstdio>
#include <cstdlib>

namespace tokenrelay::scheduler {

void assertion_failed(const char* condition, const char* message, const char* file, int line) noexcept {
  std::fprintf(stderr, "%s:%d: libscheduler: %s (%s)\n", file, line, message, condition);
  std::abort();
}

}  // namespace tokenrelay::scheduler

// The thread pool, also for ThreadSanitizer: tasks run once each, two callers at once, tasks that call back, tasks that
// throw, a pool that changes its size, a fork.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpu.hpp"
#include "pool.hpp"

namespace tokenrelay {

int processors() { return 4; }  // the pool's only question about the machine

}  // namespace tokenrelay

namespace {

using tokenrelay::parallel_for;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "test_pool: %s\n", what);
  std::exit(1);
}

/// Plain memory: that a caller may read what the tasks wrote is the pool's promise, and ThreadSanitizer's to check.
void each_task_runs_once(int calls) {
  std::vector<int64_t> out(997);
  for (int call = 0; call < calls; ++call) {
    parallel_for(static_cast<int64_t>(out.size()), [&](int64_t i) { out[static_cast<size_t>(i)] += i; });
  }
  const auto n = static_cast<int64_t>(out.size());
  expect(std::accumulate(out.begin(), out.end(), int64_t{0}) == calls * n * (n - 1) / 2, "a task ran not once");
}

void two_callers_at_once() {
  std::thread other([] { each_task_runs_once(200); });
  each_task_runs_once(200);
  other.join();
}

void a_task_may_call_back() {
  std::atomic<int64_t> sum{0};
  parallel_for(8, [&](int64_t) { parallel_for(8, [&](int64_t j) { sum.fetch_add(j); }); });
  expect(sum.load() == 8 * 28, "a task inside a task ran not once");
}

void the_first_exception_is_thrown() {
  for (int i = 0; i < 50; ++i) {
    bool thrown = false;
    try {
      parallel_for(64, [](int64_t task) {
        if (task % 7 == 3) throw std::runtime_error("task");
      });
    } catch (const std::runtime_error&) {
      thrown = true;
    }
    expect(thrown, "an exception got lost");
  }
}

void the_pool_changes_its_size() {
  for (int count : {1, 3, 2, 4}) {
    tokenrelay::set_threads(count);
    expect(tokenrelay::threads() == count, "the number of threads is another");
    each_task_runs_once(20);
  }
  std::thread other([] { each_task_runs_once(100); });
  for (int i = 0; i < 20; ++i) tokenrelay::set_threads(2 + i % 3);
  other.join();
}

void scratch_is_the_threads_own() {
  parallel_for(64, [](int64_t i) {
    auto* words = static_cast<int64_t*>(tokenrelay::scratch(0, 8 * (1 + i)));
    for (int64_t k = 0; k <= i; ++k) words[k] = i;
    for (int64_t k = 0; k <= i; ++k) expect(words[k] == i, "scratch memory is shared");
  });
}

#if !defined(__SANITIZE_THREAD__)  // ThreadSanitizer does not follow a fork of a process with threads
void a_child_starts_a_pool_of_its_own() {
  const pid_t child = fork();
  if (child == 0) {
    each_task_runs_once(5);
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a child of fork could not use the pool");
}
#endif

}  // namespace

int main() {
  each_task_runs_once(200);
  two_callers_at_once();
  a_task_may_call_back();
  the_first_exception_is_thrown();
  scratch_is_the_threads_own();
  the_pool_changes_its_size();
#if !defined(__SANITIZE_THREAD__)
  a_child_starts_a_pool_of_its_own();
#endif
  std::puts("ok");
  return 0;
}

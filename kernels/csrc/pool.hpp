// One pool of threads for all kernels of the process. The caller works too; a worker that finds nothing to do spins
// for some microseconds (the next kernel of a layer comes soon), then sleeps.
//
//   parallel_for(rows, [&](int64_t row) { ... });
//
// Tasks are handed out one by one, so results must not depend on which thread runs which; no kernel here does.
// Two callers at once: the second runs its tasks alone, on its own thread. A child of fork starts a pool of its own.
#pragma once

#include <cstdint>
#include <type_traits>

namespace tokenrelay {

// Threads that work on a call, the caller included.
int threads();
// Change that; 1 to 256, else std::invalid_argument. Waits for a running call.
void set_threads(int count);

// Runs task(context, 0 .. tasks - 1), each once, and returns when all are done. The first exception is thrown again.
void run_tasks(int64_t tasks, void (*task)(void*, int64_t), void* context);

template <class Task>
void parallel_for(int64_t tasks, Task&& task) {
  using Plain = std::remove_reference_t<Task>;
  run_tasks(
      tasks, [](void* context, int64_t index) { (*static_cast<Plain*>(context))(index); },
      const_cast<void*>(static_cast<const void*>(&task)));
}

// Scratch memory of the calling thread, 64-byte aligned and uninitialised; valid until the thread's next call with the
// same `use` (0 to 7). It grows and is kept, up to the largest need.
void* scratch(int use, int64_t bytes);

}  // namespace tokenrelay

#include "pool.hpp"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpu.hpp"

namespace tokenrelay {
namespace {

constexpr int kThreadsMax = 256;
constexpr auto kSpin = std::chrono::microseconds(20);  // about the pause between two kernels of a layer

void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

struct Call {
  void (*task)(void*, int64_t);
  void* context;
  int64_t tasks;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;  // written once, by who set `failed`

  void work() noexcept {
    for (;;) {
      const int64_t index = next.fetch_add(1, std::memory_order_relaxed);
      if (index >= tasks) return;
      try {
        task(context, index);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
        next.store(tasks, std::memory_order_relaxed);
      }
    }
  }
};

class Pool {
 public:
  explicit Pool(int count) {
    for (int i = 1; i < count; ++i) workers_.emplace_back([this] { serve(); });
  }

  ~Pool() {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
      ticket_.fetch_add(1);
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // One caller at a time (the caller holds the pool's owner lock).
  void run(Call& call) {
    {
      std::lock_guard lock(mutex_);
      call_ = &call;
      ticket_.fetch_add(1);
    }
    if (sleeping_.load() > 0) wake_.notify_all();
    call.work();
    {
      std::lock_guard lock(mutex_);
      call_ = nullptr;  // who comes now finds nothing
    }
    while (inside_.load(std::memory_order_acquire) > 0) {
      for (int i = 0; i < 64 && inside_.load(std::memory_order_relaxed) > 0; ++i) pause_briefly();
      if (inside_.load(std::memory_order_relaxed) > 0) std::this_thread::yield();
    }
  }

 private:
  void serve() {
    uint64_t seen = 0;
    for (;;) {
      Call* call = wait_for_call(seen);
      if (call == nullptr) return;
      call->work();
      inside_.fetch_sub(1, std::memory_order_release);
    }
  }

  // The next call, entered (counted in inside_), or null when the pool stops.
  Call* wait_for_call(uint64_t& seen) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    while (ticket_.load(std::memory_order_relaxed) == seen && std::chrono::steady_clock::now() < until) {
      for (int i = 0; i < 16; ++i) pause_briefly();
    }
    std::unique_lock lock(mutex_);
    for (;;) {
      if (stopping_) return nullptr;
      if (ticket_.load() != seen) {
        seen = ticket_.load();
        if (call_ != nullptr) {
          inside_.fetch_add(1);
          return call_;
        }
      }
      sleeping_.fetch_add(1);
      wake_.wait(lock);
      sleeping_.fetch_sub(1);
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> ticket_{0};  // raised with every call and at the end
  std::atomic<int> sleeping_{0}, inside_{0};
  Call* call_ = nullptr;  // under mutex_
  bool stopping_ = false;
  std::vector<std::thread> workers_;
};

std::mutex owner;  // who holds it may run or replace the pool
// Never destroyed: at the end of the process another thread may still be inside a kernel.
Pool* pool = nullptr;
std::atomic<int> wanted{0};  // threads; 0: not asked yet

void forget_in_child() {
  // The child has none of the threads. Their pool is leaked, not destroyed: joining them would wait for ever.
  pool = nullptr;
  new (&owner) std::mutex;
}

struct AtFork {
  AtFork() { pthread_atfork(nullptr, nullptr, forget_in_child); }
} at_fork;

thread_local bool inside_task = false;

struct Scratch {
  void* data = nullptr;
  int64_t bytes = 0;
  ~Scratch() { std::free(data); }
};
thread_local Scratch buffers[8];

}  // namespace

int threads() {
  int count = wanted.load();
  if (count == 0) {
    count = processors() < kThreadsMax ? processors() : kThreadsMax;
    wanted.store(count);
  }
  return count;
}

void set_threads(int count) {
  if (count < 1 || count > kThreadsMax) throw std::invalid_argument("threads must be 1 to 256");
  std::lock_guard lock(owner);
  wanted.store(count);
  if (pool != nullptr && pool->size() != count) {
    delete pool;
    pool = nullptr;
  }
}

void run_tasks(int64_t tasks, void (*task)(void*, int64_t), void* context) {
  if (tasks <= 0) return;
  Call call{task, context, tasks, {}, {}, {}};
  std::unique_lock lock(owner, std::defer_lock);
  if (tasks == 1 || threads() == 1 || inside_task || !lock.try_lock()) {
    call.work();
  } else {
    if (pool == nullptr) pool = new Pool(threads());
    inside_task = true;  // a task that calls back here would wait for itself
    pool->run(call);
    inside_task = false;
  }
  if (call.failed.load()) std::rethrow_exception(call.error);
}

void* scratch(int use, int64_t bytes) {
  Scratch& buffer = buffers[use];
  if (buffer.bytes < bytes) {
    const int64_t rounded = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    std::free(buffer.data);
    buffer = {};
    buffer.data = std::aligned_alloc(64, static_cast<size_t>(rounded));
    if (buffer.data == nullptr) throw std::bad_alloc();
    buffer.bytes = rounded;
  }
  return buffer.data;
}

}  // namespace tokenrelay

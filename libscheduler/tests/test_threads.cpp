// What two threads share of a scheduler, as in a worker: the engine's thread plans and commits; the executor's thread
// reads the block table in place, row by row, while the next step is planned. Nothing else is shared, and no lock
// protects it: rows of a launched step are never written, and a slot is leased again only after its last commit.
// ThreadSanitizer sees when that is broken (tools/sanitize.sh); without it the check is that KV is never torn.
#include <condition_variable>
#include <deque>
#include <mutex>
#include <random>
#include <thread>

#include "check.hpp"
#include "tokenrelay/scheduler/scheduler.hpp"

namespace {

using namespace tokenrelay::scheduler;

/// A step on its way between the threads.
struct Step {
  Plan plan;
  std::vector<TokenId> sampled;
  bool done = false;
};

/// A bounded queue of steps, in the order they were launched: the only synchronisation there is.
class Device {
 public:
  explicit Device(const Scheduler& scheduler)
      : table_(scheduler.block_table()),
        width_(scheduler.table_width()),
        config_(scheduler.config()),
        owner_(static_cast<std::size_t>(config_.blocks * config_.block_tokens)),
        thread_([this] { run(); }) {}
  ~Device() {
    {
      std::lock_guard lock(mutex_);
      closing_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }

  void launch(Plan plan) {
    std::lock_guard lock(mutex_);
    steps_.push_back({std::move(plan), {}, false});
    changed_.notify_all();
  }
  /// The oldest step, when it has ended.
  Step wait() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return steps_.front().done; });
    Step step = std::move(steps_.front());
    steps_.pop_front();
    --begun_;
    return step;
  }

 private:
  void run() {
    for (;;) {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [&] { return closing_ || begun_ < steps_.size(); });
      if (closing_) return;
      Step& step = steps_[begun_++];  // a deque's elements stay where they are
      lock.unlock();
      execute(step);
      lock.lock();
      step.done = true;
      changed_.notify_all();
    }
  }

  /// Reads and writes as a kernel does. The table is read from the scheduler's own memory.
  void execute(Step& step) {
    const Plan& plan = step.plan;
    for (std::size_t row = 0; row < plan.sequence_ids.size(); ++row) {
      const std::int32_t* blocks = table_ + plan.slots[row] * width_;
      const int end = plan.starts[row] + plan.lengths[row];
      std::uint64_t sum = plan.sequence_ids[row];
      for (int position = 0; position < end; ++position) {
        auto& cell = owner_[static_cast<std::size_t>(blocks[position / config_.block_tokens] * config_.block_tokens +
                                                     position % config_.block_tokens)];
        if (position >= plan.starts[row]) cell = plan.step;
        sum += cell;
      }
      if (plan.samples[row]) step.sampled.push_back(static_cast<TokenId>(sum % 50));
    }
  }

  const std::int32_t* table_;
  int width_;
  Config config_;
  std::vector<std::uint64_t> owner_;  // by slot of the cache: the step that wrote it
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Step> steps_;
  std::size_t begun_ = 0;
  bool closing_ = false;
  std::thread thread_;
};

Config config(int steps_in_flight) {
  Config c;
  c.block_tokens = 16;
  c.blocks = 12;
  c.slots = 4;
  c.context_tokens = 160;
  c.step_tokens = 64;
  c.chunk_tokens = 24;
  c.waiting_max = 8;
  c.steps_in_flight = steps_in_flight;
  return c;
}

/// Requests that share prefixes, preempt each other, are aborted in flight: the table's rows change all the time.
void drive(int steps_in_flight, std::uint64_t seed) {
  Scheduler scheduler(config(steps_in_flight));
  Device device(scheduler);
  std::mt19937_64 random(seed);
  std::vector<TokenId> text(120);
  for (auto& token : text) token = static_cast<TokenId>(random() % 50);
  int launched = 0;
  std::uint64_t id = 0;
  Outcome outcome;
  const auto commit = [&] {
    const Step step = device.wait();
    scheduler.commit(step.plan.step, step.sampled, 0, outcome);
    --launched;
  };
  for (int i = 0; i < 1500; ++i) {
    if (random() % 3 == 0) {
      const auto size = static_cast<std::size_t>(1 + random() % text.size());
      Submission submission;
      submission.sequence_id = ++id;
      submission.token_ids = std::span(text).first(size);
      submission.output_start = static_cast<int>(size);
      submission.tokens_max = static_cast<std::int64_t>(1 + random() % 40);
      (void)scheduler.submit(submission, 0);
    }
    if (random() % 8 == 0 && id > 0) scheduler.abort(1 + random() % id, 0);
    Plan plan;
    if (launched < steps_in_flight && scheduler.plan(0, plan)) {
      device.launch(std::move(plan));
      ++launched;
    } else if (launched > 0) {
      commit();
    }
    if (i % 50 == 0) {
      const auto broken = scheduler.check();
      CHECK(!broken);
    }
  }
  while (launched > 0) commit();
  CHECK(scheduler.counts().preemptions > 0);
}

TEST(a_step_reads_the_table_while_the_next_is_planned) {
  for (std::uint64_t seed = 1; seed <= 4; ++seed) {
    drive(2, seed);
    drive(4, seed);
  }
}

}  // namespace

CHECK_MAIN

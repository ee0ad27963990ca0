// The TPS floor: how much prefill a step may hold, and whether one more user may be admitted, so that every running
// user gets at least so many tokens a second.
//
// Each user has a schedule: his next token is due one period (1 / floor) after the last one. Steps that are faster than
// the period let him run ahead of it, by `slack_tokens` at most, and a prefill chunk may use what all users are ahead:
// what one feels is the rate over some tokens, not each single gap. Whoever is behind is never more than as much
// behind, so that one pause does not keep prompts out for long. In force is the smaller of the configured floor and a
// fraction of what batch 1 runs at on this device, as the cost model has it. A request may name a floor of its own,
// higher or lower, that stands in place of the configured one for its user; steps and admissions follow the highest
// that a resident one has.
#pragma once

#include <cstdint>
#include <limits>

#include "tokenrelay/scheduler/cost_model.hpp"
#include "tokenrelay/scheduler/floor_census.hpp"
#include "tokenrelay/scheduler/types.hpp"

namespace tokenrelay::scheduler {

inline constexpr std::int64_t not_due = std::numeric_limits<std::int64_t>::max();

/// What is left of a step for prompts.
struct Budget {
  int tokens = 0;
  int beside = 0;  // tokens that the step has already
  double us = std::numeric_limits<double>::infinity();
  bool learning = false;  // `tokens` is small because larger steps were not measured yet
  bool shared = false;    // `us` is what prompts are owed, though it breaks the floor
  bool at_least = false;  // the first row gets `Floor::chunk_min` tokens, whatever they take
  [[nodiscard]] bool open() const noexcept { return tokens > 0 && (us > 0 || at_least); }
};

class Floor {
 public:
  static constexpr int slack_tokens = 16;  // how far a user may be ahead of his schedule, or behind it
  static constexpr int chunk_min = 16;     // prefill tokens: a smaller chunk waits until more time is saved

  explicit Floor(const Config& config) noexcept
      : configured_(config.tps_floor),
        fraction_(config.tps_fraction),
        share_(config.prefill_share),
        wait_us_(config.floor_wait_us) {}

  /// Whether anybody has, or had, a floor.
  [[nodiscard]] bool on() const noexcept { return configured_ > 0 || asked_; }
  /// The floor in force for a user with this one of his own; 0: none, or it is not known yet.
  [[nodiscard]] double in_force(int own_tps) const noexcept { return in_force(tps_of(own_tps)); }

  // Whose floors count: `own_tps` is what the request names, 0 where it names none.
  void enter(int own_tps) noexcept {
    census_.enter(own_tps);
    asked_ |= own_tps > 0;
  }
  void leave(int own_tps) noexcept { census_.leave(own_tps); }
  [[nodiscard]] const FloorCensus& census() const noexcept { return census_; }

  // While a step is planned, in this order.
  /// The step will begin at `start_us`, as far as one knows.
  void begin(std::int64_t start_us) noexcept;
  /// A decode row is planned for a user: his schedule moves on by one token.
  void decode(std::int64_t& due_us, int own_tps) noexcept;
  /// After all decode rows: what prompts may take of a step that has room for `tokens`.
  [[nodiscard]] Budget budget(const CostModel& model, const StepShape& decodes, int tokens) const noexcept;
  /// How many drafted tokens, up to `most`, a step with so many decode rows has time for.
  [[nodiscard]] int draft_tokens(const CostModel& model, int rows, int most) const noexcept;
  /// Whether the floors still hold with so many users, the last of whom has `own_tps`. Else the reason.
  [[nodiscard]] Why admits(const CostModel& model, int rows, double context, int own_tps) const noexcept;
  /// Past this age a waiting request goes before the floor.
  [[nodiscard]] bool overdue(std::int64_t submitted_us, std::int64_t now_us) const noexcept {
    return wait_us_ > 0 && now_us - submitted_us >= wait_us_;
  }
  /// The step is complete. `prefill_us`: what its prompts take of it; `pending`: there were prompts to run.
  void planned(double step_us, double prefill_us, bool decodes, bool pending) noexcept;
  void overridden() noexcept { ++counts_.overrides; }

  // At its commit.
  /// A user's token is there; `in_flight`: more of his that are launched.
  void token(std::int64_t& due_us, int own_tps, int in_flight, std::int64_t now_us) noexcept;
  /// One more token than was planned came with his last one: of a draft that came true.
  void gained(std::int64_t& due_us, int own_tps) const noexcept {
    if (due_us != not_due) due_us += period_us(own_tps);
  }
  /// The step took `gap_us` longer than it ran: planning, waking up, handing over.
  void gap(double gap_us) noexcept;
  /// It took so much longer than was predicted, the gap left out.
  void missed(double us) noexcept;
  void committed(const CostModel& model, const StepShape& shape) noexcept;

  [[nodiscard]] double gap_us() const noexcept { return gap_us_; }
  [[nodiscard]] const FloorCounts& counts() const noexcept { return counts_; }

 private:
  [[nodiscard]] double tps_of(int own_tps) const noexcept { return own_tps > 0 ? own_tps : configured_; }
  [[nodiscard]] double in_force(double tps) const noexcept;
  [[nodiscard]] std::int64_t period_of(double tps) const noexcept;
  [[nodiscard]] std::int64_t period_us(int own_tps) const noexcept {
    return own_tps == 0 ? everybodys_period_us_ : period_of(own_tps);
  }

  double configured_;
  double fraction_;
  double share_;
  std::int64_t wait_us_;

  FloorCensus census_;
  bool asked_ = false;  // a request had a floor of its own

  std::int64_t everybodys_period_us_ = 0;  // of the configured floor in force
  std::int64_t period_us_ = 0;             // of the highest floor in force; 0: nobody has one, or it is not known yet
  double gap_us_ = 0;
  double error_us_ = 0;   // of predictions, in the mean: twice as much is kept in reserve
  double credit_us_ = 0;  // what prompts are owed of the device's time while users were behind
  double decodes_max_ = 0;
  double prefill_max_ = 0;  // tokens of one step
  int prefills_ = 0;        // steps with prefill that were measured, up to `prefills_known`
  double context_ = 0;      // of a decode row, on average, in the last step that had one

  std::int64_t start_us_ = 0;       // of the step being planned
  std::int64_t due_us_ = not_due;   // the earliest token due in it
  std::uint64_t late_in_step_ = 0;  // of the step being committed
  FloorCounts counts_;
};

}  // namespace tokenrelay::scheduler

#include "tokenrelay/scheduler/floor.hpp"

#include <algorithm>
#include <cmath>

namespace tokenrelay::scheduler {
namespace {

constexpr double gap_follows = 1.0 / 16;
constexpr double error_follows = 1.0 / 32;
constexpr double credit_periods = 4;  // prompts are owed this much at most; then they get a smallest chunk in any case
constexpr int learning_tokens = 64;   // prefill tokens beside decoding users before any were measured
constexpr int learning_rows = 2;      // users before so many were measured
constexpr int prefills_known = 4;     // steps with prefill, before what they cost keeps anybody out

}  // namespace

double Floor::in_force(double tps) const noexcept { return std::min(tps, fraction_ * counts_.tps_batch_1); }

std::int64_t Floor::period_of(double tps) const noexcept {
  const double held = in_force(tps);
  return held > 0 ? static_cast<std::int64_t>(1e6 / held) : 0;
}

void Floor::begin(std::int64_t start_us) noexcept {
  start_us_ = start_us;
  due_us_ = not_due;
  period_us_ = period_of(census_.highest(configured_));
}

void Floor::decode(std::int64_t& due_us, int own_tps) noexcept {
  const std::int64_t period = period_us(own_tps);
  if (period == 0) return;
  if (due_us == not_due) {  // his first token is in flight: let it come just before this step
    due_us_ = std::min(due_us_, start_us_ + period);
  } else {
    due_us_ = std::min(due_us_, due_us);
    due_us += period;
  }
}

Budget Floor::budget(const CostModel& model, const StepShape& decodes, int tokens) const noexcept {
  Budget budget{.tokens = tokens, .beside = static_cast<int>(decodes.decode_rows)};
  const bool nobody = configured_ <= 0 && due_us_ == not_due;  // of those who decode
  if (nobody || decodes.decode_rows == 0) return budget;
  const int known = learning_tokens + 2 * static_cast<int>(prefill_max_);  // a step that large is not far from one seen
  budget.learning = known < tokens;
  budget.tokens = std::min(tokens, known);
  if (due_us_ == not_due) return budget;
  const double reserve = 2 * error_us_;  // or every second step would be late, on a device whose steps vary
  budget.us = static_cast<double>(due_us_ - start_us_) - model.predict_us(decodes) - gap_us_ - reserve;
  // Users who are behind, or new ones without end, must not keep prompts out for ever.
  const auto period = static_cast<double>(period_us_);
  if (budget.us <= 0) {
    budget.us = std::min(credit_us_, period);
    budget.shared = true;
  }
  budget.at_least = credit_us_ >= credit_periods * period && share_ > 0;
  return budget;
}

int Floor::draft_tokens(const CostModel& model, int rows, int most) const noexcept {
  if (!on() || period_us_ == 0 || most <= 0) return std::max(0, most);
  const auto shape = [this](int count) {
    return StepShape{.decode_rows = static_cast<double>(count), .decode_context = count * context_};
  };
  const double alone = model.predict_us(shape(rows));
  const double left = static_cast<double>(period_us_) - gap_us_ - 2 * error_us_ - alone;
  const double all = model.predict_us(shape(rows + most)) - alone;
  if (all <= left) return most;
  return left <= 0 ? 0 : static_cast<int>(most * left / all);  // the cost is convex: fewer cost less than their share
}

Why Floor::admits(const CostModel& model, int rows, double context, int own_tps) const noexcept {
  const double tps = std::max(census_.highest(configured_), tps_of(own_tps));
  if (tps <= 0 || rows <= 1) return Why::none;
  // No more than twice what was measured: a cost that does not show at two users does at four.
  if (rows > std::max(learning_rows, 2 * static_cast<int>(decodes_max_))) return Why::waits_learning;
  const auto period = static_cast<double>(period_of(tps));
  if (period == 0) return Why::none;
  // A step's fixed part and a row's own cannot be told apart before two rows ran at once: until then the second one
  // counts as free, or one that looks expensive would never be tried.
  const double known = decodes_max_ > 1 ? static_cast<double>(rows) : 1.0;
  const double step = gap_us_ + model.predict_us({.decode_rows = known, .decode_context = context});
  // Prompts need time too, or nobody admitted now would ever get his first token.
  // The first prompt of a life runs on cold caches. Were it all that is known, it would keep out those from whom more
  // could be learned.
  const double prompt = prefills_ < prefills_known ? 0.0 : model.prefill_us(0, chunk_min, rows);
  const bool holds = step <= (1 - share_) * period && step + prompt <= period;
  return holds ? Why::none : Why::waits_floor;
}

void Floor::planned(double step_us, double prefill_us, bool decodes, bool pending) noexcept {
  if (!decodes || !pending) {
    credit_us_ = 0;
    return;
  }
  const double most = credit_periods * static_cast<double>(period_us_);
  credit_us_ = std::clamp(credit_us_ + share_ * step_us - prefill_us, 0.0, most);
}

void Floor::token(std::int64_t& due_us, int own_tps, int in_flight, std::int64_t now_us) noexcept {
  const std::int64_t period = period_us(own_tps);
  if (period == 0) return;
  if (due_us == not_due) {
    due_us = now_us + period * (in_flight + 1);
    return;
  }
  const std::int64_t slack = due_us - period * (in_flight + 1) - now_us;
  ++counts_.tokens;
  late_in_step_ += slack < -period ? 1 : 0;  // a whole token is missing, not a fraction of its time
  due_us += std::clamp(slack, -slack_tokens * period, slack_tokens * period) - slack;
}

void Floor::gap(double gap_us) noexcept {
  gap_us = std::clamp(gap_us, 0.0, 4 * gap_us_ + 1000);  // a pause is not a gap
  gap_us_ += gap_follows * (gap_us - gap_us_);
}

void Floor::missed(double us) noexcept {
  if (period_us_ == 0) return;
  const double error = std::min(std::abs(us - gap_us_), static_cast<double>(period_us_));  // a pause says nothing
  error_us_ += error_follows * (error - error_us_);
}

void Floor::committed(const CostModel& model, const StepShape& shape) noexcept {
  decodes_max_ = std::max(decodes_max_, shape.decode_rows);
  prefill_max_ = std::max(prefill_max_, shape.prefill_tokens);
  if (shape.prefill_tokens > 0) prefills_ = std::min(prefills_ + 1, prefills_known);
  if (!on() || shape.decode_rows == 0) return;
  counts_.tokens_late += late_in_step_;
  counts_.users_below = static_cast<int>(late_in_step_);
  late_in_step_ = 0;
  context_ = shape.decode_context / shape.decode_rows;
  const double alone_us = gap_us_ + model.predict_us({.decode_rows = 1, .decode_context = context_});
  if (alone_us < 1) return;
  counts_.tps_batch_1 = 1e6 / alone_us;
  counts_.tps_in_force = in_force(configured_);
  everybodys_period_us_ = period_of(configured_);
}

}  // namespace tokenrelay::scheduler

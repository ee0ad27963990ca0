#include "tokenrelay/scheduler/cost_model.hpp"

#include <algorithm>
#include <bit>
#include <cmath>

namespace tokenrelay::scheduler {
namespace {

// Features in the order of the descent. The fixed part comes first: as long as it cannot be told from the part per row
// or token a larger step seems cheap, is tried, and tells them apart. Were it the other way round, nobody would try.
enum Feature : std::size_t { step, prefill_token, beyond, decode_row = 5, decode_context, prefill_pair, prefill_row };
constexpr CostModel::Vector unit{1, 64, 64, 64, 64, 1, 1024, 65536, 1};  // what a scaled feature of 1 is

constexpr double cell_keeps = 1 - 1.0 / 16;     // of a cell's moments at each of its observations: 16 of them count
constexpr double total_keeps = 1 - 1.0 / 4096;  // of everything at each observation: a device changes slowly
constexpr double speed_follows = 1.0 / 8;
constexpr double too_fast = 0.25;         // of the fit: two steps were committed in one turn, or a clock jumped
constexpr std::uint64_t trusted = 4;      // observations of a cell before one can be too fast
constexpr int sweeps = 4;                 // of coordinate descent at each observation, from where the last one ended
constexpr double seen_at_least = 1e-9;    // a feature's moment below which its coefficient stays as it is
constexpr std::size_t prefill_cells = 4;  // prefill tokens: none, up to 63, up to 255, more
constexpr std::size_t decode_cells = 9;   // decode rows: none, 1, up to 3, 7, ... 127, more
constexpr std::size_t context_cells = 4;  // context of a row: up to 1023, 4095, 16383, more

double dot(const CostModel::Vector& a, const CostModel::Vector& b) noexcept {
  double sum = 0;
  for (std::size_t i = 0; i < CostModel::features; ++i) sum += a[i] * b[i];
  return sum;
}

std::size_t width_of(double value) noexcept {
  return static_cast<std::size_t>(std::bit_width(static_cast<std::uint64_t>(value)));
}

}  // namespace

void CostModel::Moments::scale(double factor) noexcept {
  for (Vector& row : squares) {
    for (double& value : row) value *= factor;
  }
  for (double& value : sums) value *= factor;
}

void CostModel::Moments::add(const Moments& other, double factor) noexcept {
  for (std::size_t i = 0; i < features; ++i) {
    for (std::size_t k = 0; k < features; ++k) squares[i][k] += factor * other.squares[i][k];
    sums[i] += factor * other.sums[i];
  }
}

void CostModel::Moments::add(const Vector& relative) noexcept {
  for (std::size_t i = 0; i < features; ++i) {
    for (std::size_t k = 0; k < features; ++k) squares[i][k] += relative[i] * relative[k];
    sums[i] += relative[i];
  }
}

CostModel::CostModel() : cells_(prefill_cells * decode_cells * context_cells) {}

CostModel::Vector CostModel::vector_of(const StepShape& shape) noexcept {
  Vector x{};
  x[prefill_token] = shape.prefill_tokens;
  x[decode_row] = shape.decode_rows;
  x[step] = 1;
  x[decode_context] = shape.decode_context;
  x[prefill_pair] = shape.prefill_pairs;
  x[prefill_row] = shape.prefill_rows;
  for (std::size_t i = 0; i < knees.size(); ++i) {
    x[beyond + i] = std::max(0.0, shape.prefill_tokens + shape.decode_rows - knees[i]);
  }
  for (std::size_t i = 0; i < features; ++i) x[i] /= unit[i];
  return x;
}

std::size_t CostModel::cell_of(const StepShape& shape) noexcept {
  const std::size_t prefill = shape.prefill_tokens < 1     ? 0
                              : shape.prefill_tokens < 64  ? 1
                              : shape.prefill_tokens < 256 ? 2
                                                           : 3;
  const std::size_t decode = std::min(width_of(shape.decode_rows), decode_cells - 1);
  const double rows = std::max(shape.decode_rows > 0 ? shape.decode_rows : shape.prefill_tokens, 1.0);
  const double context = (shape.decode_rows > 0 ? shape.decode_context : shape.prefill_pairs) / rows;
  const std::size_t width = width_of(context);
  const std::size_t level = width <= 10 ? 0 : std::min((width - 9) / 2, context_cells - 1);
  return (prefill * decode_cells + decode) * context_cells + level;
}

void CostModel::observe(const StepShape& shape, double us) noexcept {
  if (!(us >= 1)) return;
  const Vector x = vector_of(shape);
  const double fitted = dot(theta_, x);
  Cell& cell = cells_[cell_of(shape)];
  if (cell.count >= trusted) us = std::max(us, too_fast * fitted);
  if (fitted > 0) {
    const double ratio = std::clamp(us / (speed_ * fitted), 0.5, 2.0);  // one pause must not slow everything down
    speed_ *= 1 + speed_follows * (ratio - 1);
  }
  const double kept = std::pow(total_keeps, static_cast<double>(observations_ - cell.stamp));
  total_.add(cell.moments, -kept);
  cell.moments.scale(kept * cell_keeps);
  Vector relative{};
  for (std::size_t i = 0; i < features; ++i) relative[i] = x[i] / us;
  cell.moments.add(relative);
  total_.add(cell.moments, 1);
  total_.scale(total_keeps);
  cell.moments.scale(total_keeps);
  ++observations_;
  ++cell.count;
  cell.stamp = observations_;
  solve();
}

/// Coordinate descent with the constraint that no coefficient is negative. A direction that the observations do not
/// determine stays where it was.
void CostModel::solve() noexcept {
  for (int sweep = 0; sweep < sweeps; ++sweep) {
    for (std::size_t i = 0; i < features; ++i) {
      const double own = total_.squares[i][i];
      if (own < seen_at_least * total_.squares[step][step]) continue;
      const double rest = total_.sums[i] - dot(total_.squares[i], theta_) + own * theta_[i];
      theta_[i] = std::max(0.0, rest / own);
    }
  }
}

double CostModel::predict_us(const StepShape& shape) const noexcept { return speed_ * dot(theta_, vector_of(shape)); }

double CostModel::prefill_us(int start, int length, int beside) const noexcept {
  StepShape shape{.decode_rows = static_cast<double>(beside)};  // what it is does not matter: the difference is taken
  const double without = dot(theta_, vector_of(shape));
  shape.add_prefill(start, length);
  return speed_ * (dot(theta_, vector_of(shape)) - without);
}

int CostModel::prefill_tokens_within(int start, double us, int most, int beside) const noexcept {
  if (prefill_us(start, most, beside) <= us) return most;
  int fits = 0;  // what a row adds grows with its tokens
  for (int too_many = most; too_many - fits > 1;) {
    const int middle = fits + (too_many - fits) / 2;
    (prefill_us(start, middle, beside) <= us ? fits : too_many) = middle;
  }
  return fits;
}

CostModel::Vector CostModel::coefficients() const noexcept {
  const auto per = [this](std::size_t feature) { return speed_ * theta_[feature] / unit[feature]; };
  return {per(step),           per(prefill_row), per(prefill_token), per(prefill_pair), per(decode_row),
          per(decode_context), per(beyond),      per(beyond + 1),    per(beyond + 2)};
}

}  // namespace tokenrelay::scheduler

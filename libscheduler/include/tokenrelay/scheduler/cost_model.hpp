// What a step costs on this device: a linear model of what the step computes, fitted online from measured steps.
//
//     CostModel model;
//     model.observe(shape, measured_us);                     // at each commit
//     double us = model.predict_us(shape);                   // 0 while nothing is known
//     int tokens = model.prefill_tokens_within(start, us, most);
//
// time = speed * (a + b * prefill rows + c * prefill tokens + d * pairs of attention + e * decode rows + f * context
//                 + g * tokens beyond 32 + h * tokens beyond 128 + i * tokens beyond 512),
// all coefficients non-negative. Few tokens cost what the weights cost to read, many what they cost to compute: that is
// convex in the tokens of a step, and the last three make it so. Without them prompts alone, which hide the reading of
// the weights, would leave it to be explained by the rows that decode. The fit is of relative errors: a step that was
// interrupted (a paused process, a first step that compiles) looks a hundred times slower and moves nothing.
// Observations are kept in cells by the shape of the step, each of bounded weight, so that a thousand steps of one kind
// do not make it forget the others; `speed` follows at once what happens to all of them, such as a neighbour on the
// machine. Deterministic: same observations, same model.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace tokenrelay::scheduler {

/// What a step computes, as sums over its rows.
struct StepShape {
  double prefill_rows = 0;
  double prefill_tokens = 0;
  double prefill_pairs = 0;  // (query, key) pairs of prefill rows
  double decode_rows = 0;
  double decode_context = 0;  // tokens that decode rows read, their own included

  void add_prefill(int start, int length) noexcept {
    prefill_rows += 1;
    prefill_tokens += length;
    prefill_pairs += static_cast<double>(length) * (static_cast<double>(start) + (length + 1) / 2.0);
  }
  void add_decode(int context) noexcept {
    decode_rows += 1;
    decode_context += context;
  }
};

class CostModel {
 public:
  static constexpr std::size_t features = 9;
  static constexpr std::array<double, 3> knees{32, 128, 512};  // tokens of a step
  using Vector = std::array<double, features>;

  CostModel();

  /// A step of this shape took so long. Below a microsecond it was not measured.
  void observe(const StepShape& shape, double us) noexcept;
  /// How long such a step will take; 0 while nothing is known about it.
  [[nodiscard]] double predict_us(const StepShape& shape) const noexcept;
  /// What a prefill row of tokens [start, start + length) adds to a step that has so many tokens beside it.
  [[nodiscard]] double prefill_us(int start, int length, int beside = 0) const noexcept;
  /// The most tokens from `start` on, up to `most`, whose row adds no more than `us`.
  [[nodiscard]] int prefill_tokens_within(int start, double us, int most, int beside = 0) const noexcept;

  /// Microseconds per step, prefill row, prefill token, pair, decode row, token of decode context, token beyond each of
  /// `knees`; `speed` included.
  [[nodiscard]] Vector coefficients() const noexcept;
  /// How much slower the device is at this moment than the fit says; 1: just as it says.
  [[nodiscard]] double speed() const noexcept { return speed_; }
  [[nodiscard]] std::uint64_t observations() const noexcept { return observations_; }

 private:
  struct Moments {  // of x / us, over weighted observations: the normal equations of the relative error
    std::array<Vector, features> squares{};
    Vector sums{};
    void scale(double factor) noexcept;
    void add(const Moments& other, double factor) noexcept;
    void add(const Vector& relative) noexcept;
  };
  struct Cell {
    Moments moments;
    std::uint64_t stamp = 0;  // `observations_` when it was seen last
    std::uint64_t count = 0;
  };
  static Vector vector_of(const StepShape& shape) noexcept;
  static std::size_t cell_of(const StepShape& shape) noexcept;
  void solve() noexcept;

  std::vector<Cell> cells_;
  Moments total_;
  Vector theta_{};  // of scaled features
  double speed_ = 1;
  std::uint64_t observations_ = 0;
};

}  // namespace tokenrelay::scheduler

// Token weights in whole numbers, as kernels/ref/sampling.py defines them: float64 additions and multiplications only,
// each rounded (this is compiled with -ffp-contract=off), so that every instruction set gives the same bits. The loops
// are plain; the compiler vectorises them. Part of isa_*.cpp.
#pragma once

#include "leaf_math.hpp"

namespace tokenrelay::TOKENRELAY_ISA {
namespace {

constexpr double kWeightOne = 4398046511104.0;  // 2^42
constexpr float kLargest = 3.40282347e+38f;

float max_logit(const float* x, int64_t n) {
  F top = set1(-__builtin_inff());
  int64_t i = 0;
  for (; i + W <= n; i += W) top = max(min(set1(kLargest), load(x + i)), top);  // a NaN falls out of max
  float highest = largest(top);
  for (; i < n; ++i) {
    const float value = x[i] > kLargest ? kLargest : x[i];
    if (value > highest) highest = value;
  }
  return highest;
}

float peak(const float* x, int64_t n) {
  F top = set1(-__builtin_inff()), odd = zero();
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const F value = load(x + i);
    top = max(value, top);
    odd = odd + (value - value);  // 0, or no number
  }
  float highest = largest(top), rest = sum(odd);
  for (; i < n; ++i) {
    highest = x[i] > highest ? x[i] : highest;
    rest += x[i] - x[i];
  }
  return rest == 0.0f ? highest : rest;
}

// 1/k!, highest power first, as Python computes 1.0 / math.factorial(k).
constexpr double kSeries[12] = {
    1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0, 1.0 / 5040.0, 1.0 / 720.0,
    1.0 / 120.0,      1.0 / 24.0,      1.0 / 6.0,      1.0 / 2.0,     1.0,          1.0};

inline int64_t bits_of(double x) {
  int64_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline int64_t token_weight(float logit, double max, double inverse_temperature) {
  const float finite = logit > kLargest ? kLargest : logit;
  double x = (static_cast<double>(finite) - max) * inverse_temperature;
  x = x > -100.0 ? x : -100.0;                   // -inf and NaN too
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to the nearest whole number
  const double shifted = x * 1.44269504088896338700 + kRound;
  const double n = shifted - kRound;
  const double r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  double series = kSeries[0];
#pragma GCC unroll 11
  for (int i = 1; i < 12; ++i) series = series * r + kSeries[i];
  const int64_t power_bits = (bits_of(shifted) - bits_of(kRound) + 1023) << 52;
  double power;
  __builtin_memcpy(&power, &power_bits, sizeof power);
  const double weight = series * power * kWeightOne;
  constexpr double kWhole = 4503599627370496.0;  // 2^52
  double whole = (weight + kWhole) - kWhole;
  whole = whole > weight ? whole - 1.0 : whole;  // rounded down
  return bits_of(whole + kWhole) - bits_of(kWhole);
}

int64_t token_weights(const float* x, int64_t n, float max, double inverse_temperature, int64_t* weights) {
  int64_t total = 0;
  if (weights == nullptr) {
    for (int64_t i = 0; i < n; ++i) total += token_weight(x[i], max, inverse_temperature);
    return total;
  }
  for (int64_t i = 0; i < n; ++i) {
    weights[i] = token_weight(x[i], max, inverse_temperature);
    total += weights[i];
  }
  return total;
}

// In float64, in runs of fixed length, so that the result depends on the row only.
double sum_exp(const float* x, int64_t n, float max) {
  constexpr int64_t kRun = 64 * W;
  double total = 0;
  for (int64_t start = 0; start < n; start += kRun) {
    const int64_t end = min_of(n, start + kRun);
    F run = zero();
    int64_t i = start;
    for (; i + W <= end; i += W) run = run + exp(load(x + i) - set1(max));
    double last = 0;
    for (; i < end; ++i) last += exp(x[i] - max);
    total += static_cast<double>(sum(run)) + last;
  }
  return total;
}

}  // namespace
}  // namespace tokenrelay::TOKENRELAY_ISA

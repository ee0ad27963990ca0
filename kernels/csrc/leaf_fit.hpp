// Integers for a row of weights (integer.hpp), in plain C++ that the compiler vectorises. kernels/quantized.py defines
// them in torch: the bits are the same, as errors are summed in float64, where their order hardly tells.
#pragma once

#include <cmath>

#include "integer.hpp"

namespace tokenrelay::TOKENRELAY_ISA {
namespace {

// Adding 1.5 * 2^23 and taking it away leaves the nearest whole number, ties to even.
inline float nearest(float x) { return (x + 12582912.0f) - 12582912.0f; }

// The squared error of a group of 4 bits with this scale; `steps` gets its whole numbers.
inline double fit_steps(const float* x, int64_t count, float scale, float* steps) {
  double sums[kLanes] = {};
  const float divisor = scale != 0 ? scale : 1.0f;
  for (int64_t i = 0; i < count; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) {
      float step = nearest(x[i + l] / divisor);
      step = step < -8.0f ? -8.0f : step;
      step = step > 7.0f ? 7.0f : step;
      steps[i + l] = step;
      const double error = static_cast<double>(step * scale - x[i + l]);
      sums[l] += error * error;
    }
  }
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

// The scale of a group, of some up to the one that reaches its largest element (-8).
inline float fit_group(const float* x, int64_t count, float* best_steps) {
  constexpr float kShrink[] = {1.0f / -8, static_cast<float>(0.95 / -8), static_cast<float>(0.9 / -8),
                               static_cast<float>(0.85 / -8), static_cast<float>(0.8 / -8)};
  float most = x[0];
  for (int64_t i = 1; i < count; ++i) most = std::fabs(x[i]) > std::fabs(most) ? x[i] : most;
  alignas(64) float steps[kChunk];
  double least = HUGE_VAL;
  float scale = 0;
  for (int64_t i = 0; i < count; ++i) best_steps[i] = 0;
  for (const float shrink : kShrink) {
    const float tried = most * shrink;
    const double error = fit_steps(x, count, tried, steps);
    if (!(error < least)) continue;
    least = error;
    scale = tried;
    for (int64_t i = 0; i < count; ++i) best_steps[i] = steps[i];
  }
  return scale;
}

template <class T>
void fit_chunk(const T* row, int64_t width, int64_t chunk, float* part) {
  const int64_t count = min_of(kChunk, width - chunk * kChunk);
  for (int64_t i = 0; i < count; ++i) part[i] = widened(row[chunk * kChunk + i]);
  for (int64_t i = count; i < kChunk; ++i) part[i] = 0;
}

template <class T>
void fit_row(const T* row, const IntegerWeights& to, uint8_t* data, float* scales) {
  alignas(64) float part[kChunk], steps[kChunk];
  if (to.bits == 8) {
    float largest = 0, none = 0;
    for (int64_t i = 0; i < to.depth; ++i) {
      const float size = std::fabs(widened(row[i]));
      largest = size > largest ? size : largest;
      none += size * 0.0f;  // stays 0 but for what is no number: that stays visible
    }
    scales[0] = largest / 127.0f + none;
    const float divisor = scales[0] > 0 ? scales[0] : 1.0f;
    for (int64_t chunk = 0; chunk < to.chunks(); ++chunk) {
      fit_chunk(row, to.depth, chunk, part);
      for (int64_t i = 0; i < kChunk; ++i) {
        data[chunk * kChunk + i] = static_cast<uint8_t>(static_cast<int32_t>(nearest(part[i] / divisor)) + 128);
      }
    }
    return;
  }
  for (int64_t chunk = 0; chunk < to.chunks(); ++chunk) {
    fit_chunk(row, to.depth, chunk, part);
    for (int64_t g = 0; g < kChunk; g += to.group) {
      scales[(chunk * kChunk + g) / to.group] = fit_group(part + g, to.group, steps + g);
    }
    uint8_t* out = data + chunk * kChunk / 2;
    for (int64_t i = 0; i < kChunk / 2; ++i) {
      const auto low = static_cast<int32_t>(steps[i]) + 8, high = static_cast<int32_t>(steps[i + kChunk / 2]) + 8;
      out[i] = static_cast<uint8_t>(low | high << 4);
    }
  }
}

void fit(DType dtype, const void* row, const IntegerWeights& to, uint8_t* data, float* scales) {
  if (dtype == DType::float32) {
    fit_row(static_cast<const float*>(row), to, data, scales);
  } else {
    fit_row(static_cast<const bf16*>(row), to, data, scales);
  }
}

}  // namespace
}  // namespace tokenrelay::TOKENRELAY_ISA

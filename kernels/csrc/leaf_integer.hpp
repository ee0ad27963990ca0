// Integer products in plain C++, which the compiler vectorises for the instruction set that the including file names.
#pragma once

#include <cmath>

#include "integer.hpp"

namespace tokenrelay::TOKENRELAY_ISA {
namespace {

inline float widened(float x) { return x; }
inline float widened(bf16 x) { return to_float(x); }

template <class T>
void quantize_row(const T* x, const IntegerWeights& beside, const IntegerRows& to, int64_t row) {
  for (int64_t chunk = 0; chunk < to.chunks; ++chunk) {
    alignas(64) float part[kChunk] = {};
    alignas(64) int32_t whole[kChunk];
    const int64_t count = min_of(kChunk, beside.depth - chunk * kChunk), at = row * to.chunks + chunk;
    for (int64_t i = 0; i < count; ++i) part[i] = widened(x[chunk * kChunk + i]);
    float largest = 0, none = 0;
    for (int64_t i = 0; i < kChunk; ++i) {
      largest = std::fabs(part[i]) > largest ? std::fabs(part[i]) : largest;
      none += part[i] * 0.0f;  // stays 0 but for a NaN or an infinity: those make the chunk's products NaN
    }
    const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
    to.scales[at] = largest / 127.0f + none;
    for (int64_t i = 0; i < kChunk; ++i) {
      // Adding 1.5 * 2^23 leaves the nearest whole number, ties to even, in the low bits.
      const float shifted = part[i] * inverse + 12582912.0f;
      __builtin_memcpy(&whole[i], &shifted, sizeof shifted);
      whole[i] -= 0x4b400000;
    }
    for (int64_t i = 0; i < kChunk; ++i) to.data[at * kChunk + i] = static_cast<int8_t>(whole[i]);
    int32_t* zeros = to.zeros + at * 2 * kLanes;
    for (int64_t lane = 0; lane < 2 * kLanes; ++lane) {
      const int32_t* four = whole + lane * 4;
      zeros[lane] = -beside.zero() * (four[0] + four[1] + four[2] + four[3]);
    }
    if (beside.whole_chunks()) {
      for (int64_t lane = 0; lane < kLanes; ++lane) zeros[lane] += zeros[lane + kLanes];
    }
  }
}

void quantize(DType dtype, const void* x, const IntegerWeights& beside, const IntegerRows& to, int64_t row) {
  if (dtype == DType::float32) {
    quantize_row(static_cast<const float*>(x), beside, to, row);
  } else {
    quantize_row(static_cast<const bf16*>(x), beside, to, row);
  }
}

#ifndef TOKENRELAY_VNNI
inline int32_t product(const uint8_t* w, int zero, const int8_t* a, int64_t count) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += (static_cast<int32_t>(w[i]) - zero) * static_cast<int32_t>(a[i]);
  return sum;
}

float one(const IntegerWeights& w, int64_t column, const IntegerRows& rows, int64_t a) {
  const uint8_t* data = w.data + column * w.row_bytes();
  const int8_t* x = rows.data + a * rows.chunks * kChunk;
  const float* scales = w.scales + column * w.row_scales();
  float total = 0;
  for (int64_t chunk = 0; chunk < rows.chunks; ++chunk) {
    const float factor = rows.scales[a * rows.chunks + chunk];
    if (w.bits == 8) {
      total += factor * static_cast<float>(product(data + chunk * kChunk, w.zero(), x + chunk * kChunk, kChunk));
      continue;
    }
    uint8_t wide[kChunk];
    for (int64_t i = 0; i < kChunk / 2; ++i) {
      const uint8_t both = data[chunk * kChunk / 2 + i];
      wide[i] = both & 15;
      wide[i + kChunk / 2] = both >> 4;
    }
    for (int64_t g = 0; g < kChunk; g += w.group) {
      const float scale = factor * scales[(chunk * kChunk + g) / w.group];
      total += scale * static_cast<float>(product(wide + g, w.zero(), x + chunk * kChunk + g, w.group));
    }
  }
  return w.group == 0 ? total * scales[0] : total;
}

void dot(const IntegerDot& job) {
  for (int64_t i = 0; i < job.count; ++i) {
    for (int64_t c = 0; c < job.columns; ++c) {
      job.out[i * job.out_stride + c] = one(*job.weights, job.first + c, *job.rows, job.a[i]);
    }
  }
}
#endif

}  // namespace
}  // namespace tokenrelay::TOKENRELAY_ISA

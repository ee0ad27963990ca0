// What every file of the extension shares: element types and argument checks. No torch headers: tensors arrive as
// addresses, sizes and strides, checked by the Python side (kernels/cpu).
//
// Files that are compiled for one instruction set include this too. Everything here therefore has internal linkage:
// an inline function that the linker merges across files could carry AVX-512 code into a machine without it.
#pragma once

#include <cstdint>
#include <cstring>

namespace tokenrelay {

struct bf16 {
  uint16_t bits;
};

enum class DType : int32_t { float32 = 0, bfloat16 = 1 };

namespace {

inline float to_float(float x) { return x; }

inline float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline void from_float(float x, float& out) { out = x; }

// Round to nearest, ties to even; a NaN stays one.
inline void from_float(float x, bf16& out) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out.bits = static_cast<uint16_t>((bits >> 16) | 0x40u);
  } else {
    out.bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
}

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

}  // namespace
}  // namespace tokenrelay

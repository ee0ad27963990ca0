// Four lanes with the compiler's vector types: SSE2 on x86-64, NEON on ARM.
#pragma once

#include "common.hpp"

namespace tokenrelay::baseline {
namespace {

typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
constexpr int W = 4;     // lanes
constexpr int ACC = 8;   // dot products in flight
constexpr int ROWS = 2;  // of the weighted sum in flight
constexpr bool kPairs = false;

inline F set1(float x) { return F{x, x, x, x}; }
inline F zero() { return F{0, 0, 0, 0}; }
inline F load(const float* p) {
  F out;
  __builtin_memcpy(&out, p, sizeof out);
  return out;
}
inline F load(const bf16* p) { return F{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }
template <class T>
inline F load_n(const T* p, int64_t n) {
  F out = zero();
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(p[i]);
  return out;
}
inline void store(float* p, F x) { __builtin_memcpy(p, &x, sizeof x); }
inline void store(bf16* p, F x) {
  for (int i = 0; i < W; ++i) from_float(x[i], p[i]);
}
template <class T>
inline void store_n(T* p, F x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) from_float(x[i], p[i]);
}
inline F fma(F a, F b, F c) { return a * b + c; }
// Where b is NaN the result is b; where only a is, the result is b too (as x86's maxps).
inline F max(F a, F b) {
  const I greater = a > b;
  return reinterpret_cast<F>((reinterpret_cast<I>(a) & greater) | (reinterpret_cast<I>(b) & ~greater));
}
inline F min(F a, F b) {
  const I less = a < b;
  return reinterpret_cast<F>((reinterpret_cast<I>(a) & less) | (reinterpret_cast<I>(b) & ~less));
}
// Nearest whole number, |x| < 2^22.
inline F round(F x) {
  const F magic = set1(12582912.0f);
  return (x + magic) - magic;
}
// 2^n for whole n in [-127, 127]; -127 gives 0.
inline F exp2_whole(F n) {
  const I bits = (__builtin_convertvector(n, I) + 127) << 23;
  return reinterpret_cast<F>(bits);
}
inline float sum(F x) { return (x[0] + x[1]) + (x[2] + x[3]); }
inline float largest(F x) {
  const float a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
  return a > b ? a : b;
}
inline void sums(const F (&acc)[ACC], float* out) {
  for (int i = 0; i < ACC; ++i) out[i] = sum(acc[i]);
}

}  // namespace
}  // namespace tokenrelay::baseline

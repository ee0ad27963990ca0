// Norms, rotary embedding, gated activation. Part of isa_*.cpp.
#pragma once

#include "leaf_math.hpp"

namespace tokenrelay::TOKENRELAY_ISA {
namespace {

template <class T>
inline F load_upto(const T* p, int64_t n) {
  return n >= W ? load(p) : load_n(p, n);
}
template <class T>
inline void store_upto(T* p, F x, int64_t n) {
  if (n >= W) {
    store(p, x);
  } else {
    store_n(p, x, n);
  }
}

template <class T>
void rms_norm_typed(int64_t d, const T* x, const T* residual, const T* weight, float eps, T* normed, T* total) {
  F squares = zero();
  const T* summed = x;
  if (residual != nullptr) {
    for (int64_t i = 0; i < d; i += W) {
      store_upto(total + i, load_upto(x + i, d - i) + load_upto(residual + i, d - i), d - i);
    }
    summed = total;  // read back as rounded: the norm sees what the next layer adds to
  }
  for (int64_t i = 0; i < d; i += W) {
    const F value = load_upto(summed + i, d - i);
    squares = fma(value, value, squares);
  }
  const F factor = set1(1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(d) + eps));
  for (int64_t i = 0; i < d; i += W) {
    store_upto(normed + i, load_upto(summed + i, d - i) * factor * load_upto(weight + i, d - i), d - i);
  }
}

void rms_norm(DType dtype, int64_t d, const void* x, const void* residual, const void* weight, float eps, void* normed,
              void* total) {
  TOKENRELAY_BY_TYPE(
      dtype, T,
      rms_norm_typed(d, static_cast<const T*>(x), static_cast<const T*>(residual), static_cast<const T*>(weight), eps,
                     static_cast<T*>(normed), static_cast<T*>(total)));
}

template <class T>
void rotary_halves(int64_t half, const T* in, const float* cos_sin, T* out) {
  for (int64_t i = 0; i < half; i += W) {
    const int64_t n = half - i;
    const F a = load_upto(in + i, n), b = load_upto(in + half + i, n);
    const F c = load_upto(cos_sin + i, n), s = load_upto(cos_sin + half + i, n);
    store_upto(out + i, a * c - b * s, n);
    store_upto(out + half + i, b * c + a * s, n);
  }
}

template <class T>
void rotary_pairs(int64_t half, const T* in, const float* cos_sin, T* out) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = to_float(in[2 * i]), b = to_float(in[2 * i + 1]);
    const float c = cos_sin[i], s = cos_sin[half + i];
    from_float(a * c - b * s, out[2 * i]);
    from_float(b * c + a * s, out[2 * i + 1]);
  }
}

void rotary(DType dtype, int64_t r, const void* in, const float* cos_sin, bool interleaved, void* out) {
  TOKENRELAY_BY_TYPE(dtype, T, {
    if (interleaved) {
      rotary_pairs(r / 2, static_cast<const T*>(in), cos_sin, static_cast<T*>(out));
    } else {
      rotary_halves(r / 2, static_cast<const T*>(in), cos_sin, static_cast<T*>(out));
    }
  });
}

template <class TIn, class TOut>
void silu_mul_typed(const TIn* gate, const TIn* up, TOut* out, int64_t count) {
  for (int64_t i = 0; i < count; i += W) {
    const F g = load_upto(gate + i, count - i);
    store_upto(out + i, g * sigmoid(g) * load_upto(up + i, count - i), count - i);
  }
}

void silu_mul(DType in_type, const void* gate, const void* up, DType out_type, void* out, int64_t count) {
  TOKENRELAY_BY_TYPE(in_type, TIn, {
    TOKENRELAY_BY_TYPE(
        out_type, TOut,
        silu_mul_typed(static_cast<const TIn*>(gate), static_cast<const TIn*>(up), static_cast<TOut*>(out), count));
  });
}

void axpy(float a, const float* x, float* y, int64_t count) {
  for (int64_t i = 0; i < count; i += W) {
    store_upto(y + i, fma(set1(a), load_upto(x + i, count - i), load_upto(y + i, count - i)), count - i);
  }
}

void sigmoid_array(const float* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += W) store_upto(out + i, sigmoid(load_upto(x + i, n - i)), n - i);
}

void exp_array(const float* x, int64_t n, float subtract, float* out) {
  for (int64_t i = 0; i < n; i += W) store_upto(out + i, exp(load_upto(x + i, n - i) - set1(subtract)), n - i);
}

}  // namespace
}  // namespace tokenrelay::TOKENRELAY_ISA

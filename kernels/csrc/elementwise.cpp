#include "elementwise.hpp"

#include <cstring>
#include <stdexcept>
#include <string>

#include "pool.hpp"

namespace tokenrelay {
namespace {

constexpr int64_t kTaskElements = 32768;  // less than this is not worth waking a thread for

const char* at(const void* base, int64_t elements, DType dtype) {
  return static_cast<const char*>(base) + elements * size_of(dtype);
}
char* at(void* base, int64_t elements, DType dtype) { return static_cast<char*>(base) + elements * size_of(dtype); }

// Calls body(row) for all rows, several rows a task.
template <class Body>
void for_rows(int64_t rows, int64_t width, Body&& body) {
  const int64_t step = max_of(1, kTaskElements / max_of(1, width));
  parallel_for(ceil_div(rows, step), [&](int64_t task) {
    const int64_t end = min_of(rows, (task + 1) * step);
    for (int64_t row = task * step; row < end; ++row) body(row);
  });
}

}  // namespace

void rms_norm(const Table& table, DType dtype, int64_t tokens, int64_t d, const void* x, int64_t x_stride,
              const void* residual, int64_t residual_stride, const void* weight, float eps, void* normed, void* total) {
  for_rows(tokens, d, [&](int64_t row) {
    table.rms_norm(dtype, d, at(x, row * x_stride, dtype),
                   residual == nullptr ? nullptr : at(residual, row * residual_stride, dtype), weight, eps,
                   at(normed, row * d, dtype), total == nullptr ? nullptr : at(total, row * d, dtype));
  });
}

void rotary(const Table& table, DType dtype, int64_t tokens, int64_t heads, int64_t r, const void* x, int64_t x_token,
            int64_t x_head, const int64_t* positions, const float* cos_sin, int64_t table_rows, bool interleaved,
            void* out) {
  for (int64_t t = 0; t < tokens; ++t) {
    if (positions[t] < 0 || positions[t] >= table_rows) {
      throw std::invalid_argument("position " + std::to_string(positions[t]) + " of token " + std::to_string(t) +
                                  " is outside the table of " + std::to_string(table_rows) + " positions");
    }
  }
  for_rows(tokens, heads * r, [&](int64_t t) {
    for (int64_t h = 0; h < heads; ++h) {
      table.rotary(dtype, r, at(x, t * x_token + h * x_head, dtype), cos_sin + positions[t] * r, interleaved,
                   at(out, (t * heads + h) * r, dtype));
    }
  });
}

void silu_mul(const Table& table, DType dtype, int64_t tokens, int64_t f, const void* gate_up, int64_t stride,
              void* out) {
  for_rows(tokens, 2 * f, [&](int64_t t) {
    table.silu_mul(dtype, at(gate_up, t * stride, dtype), at(gate_up, t * stride + f, dtype), dtype,
                   at(out, t * f, dtype), f);
  });
}

void cache_write(const CacheWrite& w) {
  for (int64_t t = 0; t < w.tokens; ++t) {
    if (w.cache_slots[t] >= w.blocks * w.block_tokens) {
      throw std::invalid_argument("cache_slots[" + std::to_string(t) + "] is " + std::to_string(w.cache_slots[t]) +
                                  ", the cache has " + std::to_string(w.blocks * w.block_tokens));
    }
  }
  for_rows(w.tokens, w.heads * w.bytes / 2, [&](int64_t t) {
    const int64_t slot = w.cache_slots[t];
    if (slot < 0) return;
    char* to = static_cast<char*>(w.cache) + slot / w.block_tokens * w.block_stride +
               slot % w.block_tokens * w.cache_token_stride;
    const char* from = static_cast<const char*>(w.from) + t * w.token_stride;
    for (int64_t h = 0; h < w.heads; ++h) {
      std::memcpy(to + h * w.cache_head_stride, from + h * w.head_stride, static_cast<size_t>(w.bytes));
    }
  });
}

}  // namespace tokenrelay

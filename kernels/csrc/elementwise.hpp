// Operations on rows: norms, rotary embedding, gated activation, cache writes. Strides are in elements.
#pragma once

#include "table.hpp"

namespace tokenrelay {

void rms_norm(const Table& table, DType dtype, int64_t tokens, int64_t d, const void* x, int64_t x_stride,
              const void* residual, int64_t residual_stride, const void* weight, float eps, void* normed, void* total);

// One of q and k: x [tokens, heads, r] -> out, contiguous. A position outside [0, table_rows) throws.
void rotary(const Table& table, DType dtype, int64_t tokens, int64_t heads, int64_t r, const void* x, int64_t x_token,
            int64_t x_head, const int64_t* positions, const float* cos_sin, int64_t table_rows, bool interleaved,
            void* out);

void silu_mul(const Table& table, DType dtype, int64_t tokens, int64_t f, const void* gate_up, int64_t stride,
              void* out);

// Copies `count` rows of `bytes` each to cache + address(slot) where slot = block * block_tokens + offset; a negative
// slot is skipped, one outside the cache throws. Strides here are in bytes.
struct CacheWrite {
  const void* from;
  int64_t token_stride, head_stride;  // of `from`
  int64_t tokens, heads, bytes;       // bytes of one head of one token
  void* cache;                        // shifted to where the part begins
  int64_t blocks, block_tokens;
  int64_t block_stride, cache_token_stride, cache_head_stride;
  const int64_t* cache_slots;
};
void cache_write(const CacheWrite& write);

}  // namespace tokenrelay

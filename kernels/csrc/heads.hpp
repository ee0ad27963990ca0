// Latent attention's two products by head: queries into the space of latents, latents into values. Strides in elements.
#pragma once

#include "table.hpp"

namespace tokenrelay {

struct HeadProduct {
  DType dtype;
  int64_t tokens, heads, depth, width;
  const void* x;  // [tokens, heads, depth]
  int64_t x_token, x_head;
  const void* w;  // [heads, depth, width] to absorb, [heads, width, depth] to expand
  void* out;      // [tokens, heads, width]
  int64_t out_token, out_head;
};
// out[t, h] = x[t, h] . w[h], accumulated in float32. A token's result depends on its own input only.
void absorb(const Table& table, const HeadProduct& job);
void expand(const Table& table, const HeadProduct& job);

}  // namespace tokenrelay

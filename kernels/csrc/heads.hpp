// Latent attention's two products by head: queries into the space of latents, latents into values. Strides in elements.
#pragma once

#include "packed.hpp"
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
// Either of them over packed matrices, bfloat16 [.., depth] of an even depth: head h's columns begin at `first` + h *
// width. Both are multiples of kBlockColumns. `job.w` is not read.
void packed_heads(const Table& table, const HeadProduct& job, const PackedWeights& weights, int64_t first);

}  // namespace tokenrelay

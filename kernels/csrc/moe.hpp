// Mixture of experts: routing, and the chosen experts' SwiGLU networks.
#pragma once

#include "table.hpp"

namespace tokenrelay {

struct Experts {
  DType dtype;
  int64_t tokens, top_k, experts, d, f;
  const void* x;  // [tokens, d]
  int64_t x_stride;
  const int32_t* chosen;  // [tokens, top_k]; -1: none
  const float* weights;   // [tokens, top_k]
  const void* gate_up;    // [experts, 2f, d]
  const void* down;       // [experts, d, f]
  void* out;              // [tokens, d]
};
// Only chosen experts are read. A token sums its experts by ascending number. An expert out of range throws.
void moe(const Table& table, const Experts& experts);

struct Route {
  int64_t tokens, experts, top_k, groups, groups_top_k;
  const float* logits;  // [tokens, experts]
  int64_t stride;
  const float* bias;  // [experts] or null
  bool sigmoid, normalize, top2;
  float scale;
  int32_t* chosen;  // [tokens, top_k]
  float* weights;   // [tokens, top_k]
};
void moe_route(const Table& table, const Route& route);

}  // namespace tokenrelay

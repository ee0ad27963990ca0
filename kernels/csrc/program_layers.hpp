// What a program does for a layer beside its matrices and norms: attention with its cache, routing to experts, sums.
#pragma once

#include "moe.hpp"
#include "program.hpp"
#include "projected.hpp"

namespace tokenrelay {

// One layer of latent attention after its projections: rotation, the cache's new entries, queries into the space of
// latents, attention over them, latents into values. A prompt's long chunks are projected up where `up` says how.
struct MlaLayer {
  DType dtype;
  const Table *rotate, *absorb, *decode, *expand, *prefill;  // each as the registry chose it; prefill absorbs as well
  int64_t heads, nope, rope, rank, value;
  bool interleaved;
  float scale;
  const void *w_uk, *w_uv;      // [heads, nope, rank], [heads, value, rank]
  const float* cos_sin;         // [positions, rope]
  int64_t down_width, rope_at;  // of the row whose elements from `rope_at` on are the key's part to rotate
  int64_t layer;
  UpProjection up;          // no columns: nothing is packed, every row is absorbed
  PackedWeights absorbing;  // [heads * rank, nope], where `up` is there
  int64_t absorbed_least;   // tokens of a chunk that are absorbed wherever it begins
};
struct MlaBuffers {
  const char* q;                       // [t, heads, nope + rope]
  const char* latent;                  // [t, rank], normed
  const char* down;                    // [t, down_width]
  char *q_rope, *q_latent, *attended;  // room: [t, heads, rope], [t, heads, rank], [t, heads, rank]
  char* out;                           // [t, heads, value]
};
void mla_layer(const MlaLayer& layer, Side side, const StepInputs& in, const MlaBuffers& buffers);

// A router: float32 scores of x [rows, d], the chosen experts. `route` lacks its rows' numbers and addresses.
struct RouterLayer {
  DType dtype;                  // of x
  const Table *matrix, *route;  // as the registry chose them for `linear` in float32 and `moe_route`
  int64_t d;
  const void* weight;  // f32 [experts, d]
  Route shape;
};
// wide: room for f32 [rows, d]; logits: for f32 [rows, experts].
void route_rows(const RouterLayer& layer, int64_t rows, const char* x, char* wide, char* logits, char* chosen,
                char* weights);

// out = a + b, [rows, width] each; out may be either.
void add_rows(const Table& table, DType dtype, int64_t rows, int64_t width, const char* a, const char* b, char* out);

}  // namespace tokenrelay

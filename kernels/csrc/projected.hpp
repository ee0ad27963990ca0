// Latent attention of a prompt's long chunk: keys and values are projected up from the latents, stretch by stretch, and
// attended to as ordinary heads, for latents cost each pair of tokens more than they do.
#pragma once

#include "attention.hpp"
#include "packed.hpp"

namespace tokenrelay {

struct UpProjection {
  int64_t nope, value;    // of a head
  PackedWeights weights;  // bfloat16 [heads * nope + heads * value, rank]: the keys of all heads, then their values
};

// Causal attention of one row of the step: queries.a [tokens, heads, nope], queries.b [tokens, heads, rope], out
// [tokens, heads, value]; the cache holds [rank + rope] of each token. Throws std::invalid_argument for a row, slot or
// block out of range.
void projected_attention(const Table& table, const StepRows& rows, int64_t row, const PagedCache& cache,
                         const Queries& queries, const UpProjection& up, const Output& out, float scale);

// Whether so many tokens of a row that begins at `start` cost less over latents; kernels/layout.py says why.
bool costs_less_absorbed(int64_t tokens, int64_t start, int64_t rank, int64_t nope, int64_t value, int64_t at_least);

}  // namespace tokenrelay

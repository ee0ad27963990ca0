// Choosing tokens; kernels/ref/sampling.py defines every bit of it.
#pragma once

#include "table.hpp"

namespace tokenrelay {

struct Sampling {
  int64_t rows, vocab;
  const float* logits;  // [rows, vocab]
  int64_t stride;
  const float *temperature, *top_p, *min_p;  // [rows]
  const int32_t* top_k;
  const int64_t* seed;
  const int32_t* choice;
  const int64_t* position;
  int64_t* tokens;  // out [rows]
};
void sample(const Table& table, const Sampling& sampling);

struct Logprobs {
  int64_t rows, vocab, top_k;
  const float* logits;
  int64_t stride;
  const int64_t* tokens;  // [rows]
  float *chosen, *top;    // out [rows], [rows, top_k]
  int64_t* top_tokens;    // out [rows, top_k]
};
void token_logprobs(const Table& table, const Logprobs& logprobs);

struct Penalties {
  int64_t rows, vocab, count, seen_total, bias_total;
  float* logits;
  int64_t stride;
  const int64_t* row;                              // [count]
  const float *presence, *frequency, *repetition;  // [count]
  const int64_t *offsets, *tokens;                 // [count + 1], [seen_total]
  const int32_t* output_counts;                    // [seen_total]
  const int64_t *bias_offsets, *bias_tokens;       // [count + 1], [bias_total]
  const float* bias;                               // [bias_total]
};
void apply_penalties(const Penalties& penalties);

// finite[r] = 1 where all of logits[r] [vocab] are finite, else 0.
void finite_rows(int64_t rows, int64_t vocab, const float* logits, int64_t stride, uint8_t* finite);

}  // namespace tokenrelay

// Paged attention: how a step's rows become units of work, and runs of tokens become tasks.
//
// A context is cut at multiples of kRunTokens, whatever the batch and the number of threads; runs are computed on their
// own and merged in order. A row's result therefore depends on its own query and cache only, and the absorbed prefill
// of a token gives the bits that its decode gives.
#pragma once

#include "table.hpp"

namespace tokenrelay {

// The rows of a step; addresses of the tensors of AttentionBatch (kernels/batch.py).
struct StepRows {
  const int32_t* block_table;  // [slots_total, blocks_max]
  int64_t slots_total, blocks_max;
  const int32_t *slots, *starts, *lengths, *offsets;  // [n], [n], [n], [n + 1]
  int64_t first, last;                                // the rows to work on: [first, last)
  int64_t token_base;                                 // the token of the step that index 0 of q and out stands for
};

// Where a layer's keys and values lie; strides in elements.
struct PagedCache {
  DType dtype;
  const void* data;
  int64_t blocks, block_tokens;
  int64_t block_stride, token_stride;
  int64_t head_stride;   // from one KV head to the next; 0 with one head
  int64_t value_offset;  // from a token's key to its value; 0 for MLA, whose values are the keys' first dv elements
  int64_t kv_heads;
};

// Queries: [tokens, heads, part] in one or two parts (MLA: latent and rope), any strides with a contiguous last axis.
struct Queries {
  int64_t tokens, heads;
  const void *a, *b;  // b: null, or the second part
  int64_t da, db;
  int64_t a_token, a_head, b_token, b_head;  // strides
};

struct Output {
  void* data;  // [tokens, heads, dv]
  int64_t dv, token_stride, head_stride;
};

// Causal attention of the rows' tokens over their cache. Throws std::invalid_argument for rows, slots or blocks out of
// range.
void paged_attention(const Table& table, const StepRows& rows, const PagedCache& cache, const Queries& queries,
                     const Output& out, float scale);

// Throws std::invalid_argument where a row, its slot or its blocks are out of range.
void check_row(const StepRows& rows, const PagedCache& cache, const Queries& queries, int64_t row);

// Attention over one stretch of keys and values that were projected up from latents, added to a running state.
struct DenseStretch {
  DType dtype;
  int64_t heads, q_tokens, tokens;
  int64_t first;      // absolute position of token 0, a multiple of kRunTokens
  int64_t q_first;    // absolute position of query 0; query i sees positions [0, q_first + i]
  const void *k, *v;  // [tokens, heads, dk], [tokens, heads, dv]
  const void* k2;     // [tokens, dk2], shared by the heads
  int64_t dk, dk2, dv;
  int64_t k_token, k_head, v_token, v_head, k2_token;  // strides
};

// state: m [h, q_tokens], l [h, q_tokens], o [h, q_tokens, dv]; the stretch that begins at position 0 sets it.
void dense_attention(const Table& table, const DenseStretch& stretch, const Queries& queries, float scale, float* m,
                     float* l, float* o);
// out[token, head] = o / l.
void dense_finish(const Table& table, DType dtype, int64_t heads, int64_t q_tokens, const float* l, const float* o,
                  const Output& out);

}  // namespace tokenrelay

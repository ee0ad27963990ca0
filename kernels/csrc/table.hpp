// The inner loops that exist once per instruction set. The files *.cpp beside this one split work into tasks and call
// these through a table; each isa_*.cpp fills one table, compiled with its own flags.
//
// Contract of all: an output row depends on its own inputs only, never on how many rows stand beside it or which
// thread runs it.
#pragma once

#include "common.hpp"
#include "cpu.hpp"

namespace tokenrelay {

constexpr int64_t kTileTokens = 64;  // keys that one pass of the online softmax takes
constexpr int64_t kRunTokens = 512;  // of a context that are attended to at once, then merged with the next

// Attention of some query rows over one run of cached tokens. Rows share keys and values; their visible length differs.
// Several KV heads at once, where AttendNeeds allows it: each has as many rows of its own, that see as much.
struct AttendJob {
  DType dtype;                // of keys and values
  int64_t rows, dk, dk2, dv;  // dk2: 0, or the length of a second part of each key that is stored elsewhere
  int64_t heads, head_bytes;  // KV heads, and from one's keys and values to the next's
  const void* q;              // [heads, rows, dk + dk2] of q_type(dtype), packed, the second part behind the first
  const void* const* k;       // [tokens] address of each token's key
  const void* const* k2;      // [tokens], where dk2 > 0
  const void* const* v;       // [tokens] address of each token's value
  int64_t tokens;             // at most kRunTokens
  int64_t first;              // absolute position of token 0
  const int64_t* visible;     // [rows] tokens of the sequence that the row sees, from position 0
  float scale;
  float *m, *l,
      *o;  // out, heads times: [rows] maximum, [rows] sum, [rows, dv] weighted values, not yet divided by the sum
  float* scores;  // scratch, of AttendNeeds::bytes
};

// How attention over keys of one shape likes to be called; its bits do not depend on it.
struct AttendNeeds {
  int64_t rows;   // that best share a job
  int64_t held;   // a job of several heads has at most so many rows in all; 0: one head a job
  int64_t bytes;  // of scratch for a job of `rows` rows or fewer
};

// out[i, j] = a[i] . b[j], accumulated in float32.
struct DotJob {
  DType dtype;  // of b
  int64_t rows, columns, depth;
  const void* const* a;  // [rows] addresses, of q_type(dtype)
  const void* const* b;  // [columns] addresses
  float* out;
  int64_t out_stride;
};

struct Table {
  // The type that queries and activations must have beside keys and weights of `dtype`: bfloat16 only where the
  // instruction set multiplies bfloat16 pairs.
  DType (*q_type)(DType dtype);
  void (*convert)(DType from, const void* in, DType to, void* out, int64_t count);

  AttendNeeds (*attend_needs)(DType dtype, int64_t dk, int64_t dk2, int64_t dv);
  void (*attend)(const AttendJob& job);
  // o[r] += sum of p[r, i] * v[i] over `count` <= kTileTokens rows v [dv] of dtype; p [rows, kTileTokens] is 0 beyond.
  void (*weigh)(DType dtype, const float* p, int64_t rows, const void* const* v, int64_t count, int64_t dv, float* o);
  // (m, l, o) of an earlier run of tokens takes in those of the next run.
  void (*merge)(int64_t rows, int64_t dv, float* m, float* l, float* o, const float* m2, const float* l2,
                const float* o2);
  void (*divide)(DType dtype, int64_t dv, float l, const float* o, void* out);

  void (*dot)(const DotJob& job);
  void (*silu_mul)(DType in_type, const void* gate, const void* up, DType out_type, void* out, int64_t count);
  void (*axpy)(float a, const float* x, float* y, int64_t count);  // y += a * x

  // x and residual [d]; residual may be null; total (the rounded sum) is written where residual is not null.
  void (*rms_norm)(DType dtype, int64_t d, const void* x, const void* residual, const void* weight, float eps,
                   void* normed, void* total);
  // One head: in, out [r], cos_sin [r].
  void (*rotary)(DType dtype, int64_t r, const void* in, const float* cos_sin, bool interleaved, void* out);

  // The largest of x [n], NaN left out, +inf taken as the largest finite value; -inf where there is none.
  float (*max_logit)(const float* x, int64_t n);
  // The largest of x [n], n > 0; a NaN where one of them is not finite.
  float (*peak)(const float* x, int64_t n);
  // Weights as ref/sampling.py defines them, and their sum; weights may be null.
  int64_t (*token_weights)(const float* x, int64_t n, float max, double inverse_temperature, int64_t* weights);
  double (*sum_exp)(const float* x, int64_t n, float max);                   // sum of exp(x - max)
  void (*exp_array)(const float* x, int64_t n, float subtract, float* out);  // out = exp(x - subtract)
  void (*sigmoid_array)(const float* x, int64_t n, float* out);
};

const Table& table_baseline();
const Table& table_avx2();
const Table& table_avx512();
const Table& table_avx512bf16();

// Throws std::invalid_argument where this machine cannot run it.
const Table& table_of(int isa);

}  // namespace tokenrelay

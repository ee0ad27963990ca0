#include "program_layers.hpp"

#include <cstring>

#include "heads.hpp"
#include "linear.hpp"
#include "pool.hpp"

namespace tokenrelay {
namespace {

constexpr int64_t kTaskElements = 32768;  // less than this is not worth waking a thread for
constexpr int64_t kSumElements = 256;     // that are added at once
constexpr int64_t kRoutedRows = 16;       // of a task

// Rotates the queries' parts, and writes this step's latents and keys.
void turn_and_write(const MlaLayer& l, Side side, const StepInputs& in, const MlaBuffers& b) {
  const int64_t size = size_of(l.dtype), width = l.rank + l.rope, all = l.heads * (l.nope + l.rope);
  char* cache = static_cast<char*>(const_cast<void*>(in.caches[l.layer]));
  const int64_t step = max_of(1, kTaskElements / (all + width));
  parallel_for(ceil_div(in.tokens, step), [&](int64_t task) {
    for (int64_t t = task * step; t < min_of(in.tokens, (task + 1) * step); ++t) {
      const float* cos_sin = l.cos_sin + in.positions[t] * l.rope;
      for (int64_t h = 0; side != Side::keys && h < l.heads; ++h) {
        l.rotate->rotary(l.dtype, l.rope, b.q + (t * all + h * (l.nope + l.rope) + l.nope) * size, cos_sin,
                         l.interleaved, b.q_rope + (t * l.heads + h) * l.rope * size);
      }
      const int64_t slot = side == Side::queries
                               ? -1
                               : in.cache_slots[t];  // block * block_tokens + offset, and entries lie in that order
      if (slot < 0) continue;
      char* entry = cache + slot * width * size;
      std::memcpy(entry, b.latent + t * l.rank * size, static_cast<size_t>(l.rank * size));
      l.rotate->rotary(l.dtype, l.rope, b.down + (t * l.down_width + l.rope_at) * size, cos_sin, l.interleaved,
                       entry + l.rank * size);
    }
  });
}

}  // namespace

void mla_layer(const MlaLayer& l, Side side, const StepInputs& in, const MlaBuffers& b) {
  turn_and_write(l, side, in, b);
  if (side == Side::keys) return;
  const int64_t size = size_of(l.dtype), width = l.rank + l.rope, head = l.nope + l.rope;
  const PagedCache paged{l.dtype, in.caches[l.layer], in.blocks, in.block_tokens, in.block_tokens * width, width, 0, 0,
                         1};
  const bool packed = l.up.weights.columns > 0;
  const auto attend = [&](const Table& absorbs, const Table& table, const Table& expands, int64_t first, int64_t last,
                          int64_t token, int64_t tokens) {
    if (first == last) return;
    const int64_t shift = token * l.heads * size;
    char *q_latent = b.q_latent + shift * l.rank, *attended = b.attended + shift * l.rank;
    const HeadProduct in_latents{l.dtype,        tokens, l.heads, l.nope,   l.rank,           b.q + shift * head,
                                 l.heads * head, head,   l.w_uk,  q_latent, l.heads * l.rank, l.rank};
    packed ? packed_heads(absorbs, in_latents, l.absorbing, 0) : absorb(absorbs, in_latents);
    StepRows rows = in.batch;
    rows.first = first;
    rows.last = last;
    rows.token_base = token;
    const Queries queries{tokens, l.heads,          q_latent, b.q_rope + shift * l.rope, l.rank,
                          l.rope, l.heads * l.rank, l.rank,   l.heads * l.rope,          l.rope};
    paged_attention(table, rows, paged, queries, {attended, l.rank, l.heads * l.rank, l.rank}, l.scale);
    const HeadProduct values{l.dtype,           tokens,           l.heads, l.rank, l.value,
                             attended,          l.heads * l.rank, l.rank,  l.w_uv, b.out + shift * l.value,
                             l.heads * l.value, l.value};
    packed ? packed_heads(expands, values, l.up.weights, l.heads * l.nope) : expand(expands, values);
  };
  attend(*l.absorb, *l.decode, *l.expand, 0, in.decodes, 0, in.decodes);
  const auto absorbs = [&](int64_t row) {
    return l.up.weights.columns == 0 ||
           costs_less_absorbed(in.batch.lengths[row], in.batch.starts[row], l.rank, l.nope, l.value, l.absorbed_least);
  };
  for (int64_t row = in.decodes; row < in.rows;) {
    int64_t last = row;
    while (last < in.rows && absorbs(last)) ++last;
    const int64_t token = in.batch.offsets[row];
    if (last > row) {  // some short rows side by side
      attend(*l.prefill, *l.prefill, *l.prefill, row, last, token, in.batch.offsets[last] - token);
      row = last;
      continue;
    }
    const Queries queries{in.tokens, l.heads,        b.q,  b.q_rope,         l.nope,
                          l.rope,    l.heads * head, head, l.heads * l.rope, l.rope};
    StepRows rows = in.batch;
    rows.token_base = 0;
    projected_attention(*l.prefill, rows, row, paged, queries, l.up, {b.out, l.value, l.heads * l.value, l.value},
                        l.scale);
    ++row;
  }
}

void route_rows(const RouterLayer& l, int64_t rows, const char* x, char* wide, char* logits, char* chosen,
                char* weights) {
  const int64_t experts = l.shape.experts, top_k = l.shape.top_k, size = size_of(l.dtype);
  parallel_for(ceil_div(rows, kRoutedRows), [&](int64_t task) {  // what is called from a task runs on its thread alone
    const int64_t first = task * kRoutedRows, count = min_of(kRoutedRows, rows - first);
    const char* from = x + first * l.d * size;
    if (l.dtype != DType::float32) {
      char* to = wide + first * l.d * 4;
      l.matrix->convert(l.dtype, from, DType::float32, to, count * l.d);
      from = to;
    }
    float* scores = reinterpret_cast<float*>(logits) + first * experts;
    linear(*l.matrix, {DType::float32, DType::float32, count, experts, l.d, from, l.d, l.weight, nullptr, scores});
    Route route = l.shape;
    route.tokens = count;
    route.logits = scores;
    route.stride = experts;
    route.chosen = reinterpret_cast<int32_t*>(chosen) + first * top_k;
    route.weights = reinterpret_cast<float*>(weights) + first * top_k;
    moe_route(*l.route, route);
  });
}

void add_rows(const Table& table, DType dtype, int64_t rows, int64_t width, const char* a, const char* b, char* out) {
  const int64_t size = size_of(dtype), count = rows * width, step = kTaskElements / kSumElements * kSumElements;
  parallel_for(ceil_div(count, step), [&](int64_t task) {
    alignas(64) float left[kSumElements], sum[kSumElements];
    for (int64_t i = task * step; i < min_of(count, (task + 1) * step); i += kSumElements) {
      const int64_t some = min_of(kSumElements, count - i);
      table.convert(dtype, a + i * size, DType::float32, left, some);
      table.convert(dtype, b + i * size, DType::float32, sum, some);
      table.axpy(1.0f, left, sum, some);
      table.convert(DType::float32, sum, dtype, out + i * size, some);
    }
  });
}

}  // namespace tokenrelay

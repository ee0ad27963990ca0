#include "projected.hpp"

#include <cstring>

#include "pool.hpp"

namespace tokenrelay {
namespace {

constexpr int64_t kStretchTokens = 2048;  // that are projected up at once: in runs, and room for them in the last cache
constexpr int64_t kStretchBytes = int64_t{32} << 20;
constexpr int64_t kCopiedTokens = 64;  // of a task
constexpr int64_t kLine = 64;

// Scratch of the thread that asks; attention.hpp's and the products' own slots are others.
enum Use { kRoom = 7 };

int64_t padded(int64_t bytes) { return ceil_div(bytes, kLine) * kLine; }

// The latents and rotated keys of `count` tokens from `first` on, side by side.
void gather(const StepRows& rows, int64_t row, const PagedCache& cache, int64_t width, int64_t first, int64_t count,
            char* to) {
  const int32_t* blocks = rows.block_table + rows.slots[row] * rows.blocks_max;
  const int64_t size = size_of(cache.dtype);
  parallel_for(ceil_div(count, kCopiedTokens), [&](int64_t task) {
    for (int64_t i = task * kCopiedTokens; i < min_of(count, (task + 1) * kCopiedTokens); ++i) {
      const int64_t block = blocks[(first + i) / cache.block_tokens], offset = (first + i) % cache.block_tokens;
      const auto* from = static_cast<const char*>(cache.data);
      from += (block * cache.block_stride + offset * cache.token_stride) * size;
      std::memcpy(to + i * width * size, from, static_cast<size_t>(width * size));
    }
  });
}

}  // namespace

void projected_attention(const Table& table, const StepRows& rows, int64_t row, const PagedCache& cache,
                         const Queries& queries, const UpProjection& up, const Output& out, float scale) {
  check_row(rows, cache, queries, row);
  const int64_t size = size_of(cache.dtype), rank = up.weights.depth, rope = queries.db, width = rank + rope;
  const int64_t heads = queries.heads, columns = heads * (up.nope + up.value), tokens = rows.lengths[row];
  const int64_t token = rows.offsets[row] - rows.token_base, start = rows.starts[row], context = start + tokens;
  if (tokens == 0) return;
  const int64_t fitting = kStretchBytes / (columns * size) / kRunTokens * kRunTokens;
  const int64_t stretch = min_of(kStretchTokens, max_of(kRunTokens, fitting));
  const int64_t most = min_of(stretch, context), entry_bytes = padded(most * width * size);
  const int64_t up_bytes = padded(most * columns * size), row_bytes = padded(heads * tokens * 4);
  char* room = static_cast<char*>(
      scratch(kRoom, entry_bytes + up_bytes + 2 * row_bytes + padded(heads * tokens * up.value * 4)));
  char *entries = room, *projected = entries + entry_bytes;
  float* m = reinterpret_cast<float*>(projected + up_bytes);
  float *l = m + row_bytes / 4, *o = l + row_bytes / 4;
  Queries asked = queries;
  asked.tokens = tokens;
  asked.a = static_cast<const char*>(queries.a) + token * queries.a_token * size;
  asked.b = static_cast<const char*>(queries.b) + token * queries.b_token * size;
  for (int64_t first = 0; first < context; first += stretch) {
    const int64_t count = min_of(stretch, context - first);
    gather(rows, row, cache, width, first, count, entries);
    packed_linear(table, {cache.dtype, cache.dtype, count, entries, width, up.weights, nullptr, projected});
    const DenseStretch dense{cache.dtype,
                             heads,
                             tokens,
                             count,
                             first,
                             start,
                             projected,
                             projected + heads * up.nope * size,
                             entries + rank * size,
                             up.nope,
                             rope,
                             up.value,
                             columns,
                             up.nope,
                             columns,
                             up.value,
                             width};
    dense_attention(table, dense, asked, scale, m, l, o);
  }
  dense_finish(
      table, cache.dtype, heads, tokens, l, o,
      {static_cast<char*>(out.data) + token * out.token_stride * size, up.value, out.token_stride, out.head_stride});
}

bool costs_less_absorbed(int64_t tokens, int64_t start, int64_t rank, int64_t nope, int64_t value, int64_t at_least) {
  const int64_t saved = 2 * rank - nope - value;
  if (saved <= 0 || tokens <= at_least) return true;
  return (tokens + 2 * start) * tokens <= 2 * start * rank * (nope + value) / saved;
}

}  // namespace tokenrelay

#include "heads.hpp"

#include <algorithm>
#include <stdexcept>

#include "packed_rows.hpp"
#include "pool.hpp"

namespace tokenrelay {
namespace {

constexpr int64_t kRows = 64;     // tokens of a task
constexpr int64_t kColumns = 64;  // of `expand` that pass together

enum Use { kOut, kRowsOf, kWeights };

const char* at(const void* base, int64_t elements, DType dtype) {
  return static_cast<const char*>(base) + elements * size_of(dtype);
}
char* at(void* base, int64_t elements, DType dtype) { return static_cast<char*>(base) + elements * size_of(dtype); }

// Calls body(head, first token, tokens) for all heads and blocks of tokens.
template <class Body>
void for_blocks(const HeadProduct& job, Body&& body) {
  const int64_t blocks = ceil_div(job.tokens, kRows);
  parallel_for(job.heads * blocks, [&](int64_t i) {
    const int64_t token = i % blocks * kRows;
    body(i / blocks, token, min_of(kRows, job.tokens - token));
  });
}

const void* input(const HeadProduct& job, int64_t token, int64_t head) {
  return at(job.x, token * job.x_token + head * job.x_head, job.dtype);
}

void store(const Table& table, const HeadProduct& job, const float* from, int64_t token, int64_t head, int64_t column,
           int64_t columns) {
  void* to = at(job.out, token * job.out_token + head * job.out_head + column, job.dtype);
  table.convert(DType::float32, from, job.dtype, to, columns);
}

}  // namespace

void absorb(const Table& table, const HeadProduct& job) {
  for_blocks(job, [&](int64_t head, int64_t token, int64_t rows) {
    // The rows of w are weighed by x as attention weighs values, kTileTokens of them at a time.
    const int64_t tiles = ceil_div(job.depth, kTileTokens), padded = tiles * kTileTokens;
    float* x = static_cast<float*>(scratch(kRowsOf, rows * padded * 4));
    std::fill(x, x + rows * padded, 0.0f);
    float* line = static_cast<float*>(scratch(kOut, (padded + rows * job.width) * 4));
    float* out = line + padded;
    for (int64_t r = 0; r < rows; ++r) {
      table.convert(job.dtype, input(job, token + r, head), DType::float32, line, job.depth);
      for (int64_t i = 0; i < job.depth; ++i) x[(i / kTileTokens * rows + r) * kTileTokens + i % kTileTokens] = line[i];
    }
    const void* w[kTileTokens];
    std::fill(out, out + rows * job.width, 0.0f);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t first = tile * kTileTokens, count = min_of(kTileTokens, job.depth - first);
      for (int64_t i = 0; i < count; ++i) w[i] = at(job.w, (head * job.depth + first + i) * job.width, job.dtype);
      table.weigh(job.dtype, x + tile * rows * kTileTokens, rows, w, count, job.width, out);
    }
    for (int64_t r = 0; r < rows; ++r) store(table, job, out + r * job.width, token + r, head, 0, job.width);
  });
}

void expand(const Table& table, const HeadProduct& job) {
  const DType a_type = table.q_type(job.dtype);
  for_blocks(job, [&](int64_t head, int64_t token, int64_t rows) {
    const void *a[kRows], *w[kColumns];
    char* wide = a_type == job.dtype ? nullptr : static_cast<char*>(scratch(kRowsOf, rows * job.depth * 4));
    for (int64_t r = 0; r < rows; ++r) {
      a[r] = input(job, token + r, head);
      if (wide != nullptr) {
        table.convert(job.dtype, a[r], a_type, wide + r * job.depth * 4, job.depth);
        a[r] = wide + r * job.depth * 4;
      }
    }
    float* out = static_cast<float*>(scratch(kOut, kRows * kColumns * 4));
    for (int64_t column = 0; column < job.width; column += kColumns) {
      const int64_t columns = min_of(kColumns, job.width - column);
      for (int64_t c = 0; c < columns; ++c) {
        w[c] = at(job.w, (head * job.width + column + c) * job.depth, job.dtype);
      }
      table.dot({job.dtype, rows, columns, job.depth, a, w, out, kColumns});
      for (int64_t r = 0; r < rows; ++r) store(table, job, out + r * kColumns, token + r, head, column, columns);
    }
  });
}

void packed_heads(const Table& table, const HeadProduct& job, const PackedWeights& w, int64_t first) {
  check(w);
  if (w.bits != 16 || job.dtype != DType::bfloat16 || w.depth != job.depth || w.depth % 2 != 0 ||
      job.width % kBlockColumns != 0 || first % kBlockColumns != 0 || first + job.heads * job.width > w.columns) {
    throw std::invalid_argument("packed heads are bfloat16, of an even depth and widths that are multiples of 16");
  }
  const PackedKernels& kernels = packed_kernels(w.bits);
  const int64_t panels = ceil_div(job.width, kColumns), tasks = job.heads * panels, size = size_of(job.dtype);
  const auto block_of = [&](int64_t task) {
    return (first + task / panels * job.width + task % panels * kColumns) / kBlockColumns;
  };
  parallel_for(tasks, [&](int64_t task) {
    const int64_t head = task / panels, column = task % panels * kColumns;
    const int64_t columns = min_of(kColumns, job.width - column), blocks = columns / kBlockColumns;
    const int64_t next = task + threads();  // most likely this thread's
    const char* after = next < tasks ? w.data + block_of(next) * w.block_bytes() : nullptr;
    alignas(64) float product[kPackedRowsMax * kColumns];
    const Passes passes(job.tokens, kernels.rows);
    for (int64_t pass = 0; pass < passes.count(); ++pass) {
      const int64_t token = passes.begin(pass), count = passes.begin(pass + 1) - token;
      kernels.dot({&w, block_of(task), blocks, input(job, token, head), job.x_token * size, count, product, kColumns,
                   passes.fetch(pass, after, blocks * w.block_bytes())});
      for (int64_t i = 0; i < count; ++i) store(table, job, product + i * kColumns, token + i, head, column, columns);
    }
  });
}

}  // namespace tokenrelay

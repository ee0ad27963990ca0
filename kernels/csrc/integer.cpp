#include "integer.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "expert_groups.hpp"
#include "pool.hpp"
#include "winners.hpp"

namespace tokenrelay {
namespace {

constexpr int64_t kColumns = 32;  // of one task
constexpr int64_t kRows = 64;     // that pass over a task's weights together

enum Use { kProduct, kNumbers };

const char* at(const void* base, int64_t elements, DType dtype) {
  return static_cast<const char*>(base) + elements * size_of(dtype);
}

void check(const IntegerWeights& w) {
  const bool known = w.bits == 8 ? w.group == 0 : w.bits == 4 && (w.group == 32 || w.group == 64 || w.group == 128);
  if (!known) {
    throw std::invalid_argument("weights of " + std::to_string(w.bits) + " bits in groups of " +
                                std::to_string(w.group) +
                                ": expected 8 bits in rows (0), or 4 in groups of 32, 64 or 128");
  }
}

// Activations, rounded to bytes for products with some weights.
struct Quantized {
  Quantized(const IntegerTable& integers, DType dtype, const void* x, int64_t rows, int64_t stride,
            const IntegerWeights& beside)
      : data(static_cast<size_t>(rows * beside.chunks() * kChunk)),
        scales(static_cast<size_t>(rows * beside.chunks())),
        zeros(scales.size() * 2 * kLanes),
        view{beside.chunks(), data.data(), scales.data(), zeros.data()} {
    const auto quantize = [&](int64_t r) { integers.quantize(dtype, at(x, r * stride, dtype), beside, view, r); };
    if (rows == 1) {
      quantize(0);  // not worth waking anybody
    } else {
      parallel_for(rows, quantize);
    }
  }
  Quantized(const Quantized&) = delete;
  Quantized& operator=(const Quantized&) = delete;

  std::vector<int8_t> data;
  std::vector<float> scales;
  std::vector<int32_t> zeros;
  IntegerRows view;
};

class IntegerMoe {
 public:
  IntegerMoe(const IntegerTable& integers, const Table& table, const IntegerExperts& e)
      : integers_(integers),
        table_(table),
        e_(e),
        groups_(group_by_expert(e.chosen, e.weights, e.tokens, e.top_k, e.experts)) {}

  void run() {
    const auto rows = static_cast<int64_t>(groups_.assignments.size());
    const Quantized inputs(integers_, e_.dtype, e_.x, e_.tokens, e_.x_stride, e_.gate_up);
    std::vector<float> hidden(static_cast<size_t>(rows * e_.f));
    const int64_t blocks = ceil_div(e_.f, kColumns);
    parallel_for(groups_.count() * blocks,
                 [&](int64_t i) { activate(inputs.view, i / blocks, i % blocks * kColumns, hidden.data()); });
    const Quantized between(integers_, DType::float32, hidden.data(), rows, e_.f, e_.down);
    parallel_for(ceil_div(e_.d, kColumns), [&](int64_t i) { down(between.view, i * kColumns); });
  }

 private:
  // hidden[assignments of the group, columns] = silu(x . gate) * (x . up)
  void activate(const IntegerRows& inputs, int64_t group, int64_t column, float* hidden) {
    const size_t first = groups_.firsts[static_cast<size_t>(group)];
    const int64_t rows = static_cast<int64_t>(groups_.firsts[static_cast<size_t>(group) + 1] - first);
    const int64_t columns = min_of(kColumns, e_.f - column), gate_row = groups_.assignments[first].expert * 2 * e_.f;
    float* gate = static_cast<float*>(scratch(kProduct, 2 * kRows * kColumns * 4));
    float* up = gate + kRows * kColumns;
    int64_t* tokens = static_cast<int64_t*>(scratch(kNumbers, kRows * 8));
    for (int64_t r = 0; r < rows; r += kRows) {
      const int64_t some = min_of(kRows, rows - r);
      for (int64_t i = 0; i < some; ++i) tokens[i] = groups_.assignments[first + static_cast<size_t>(r + i)].token;
      const int64_t begins[] = {gate_row + column, gate_row + e_.f + column};
      integers_.dot({&e_.gate_up, begins[0], columns, &inputs, tokens, some, gate, kColumns});
      integers_.dot({&e_.gate_up, begins[1], columns, &inputs, tokens, some, up, kColumns});
      for (int64_t i = 0; i < some; ++i) {
        float* to = hidden + (static_cast<int64_t>(first) + r + i) * e_.f + column;
        table_.silu_mul(DType::float32, gate + i * kColumns, up + i * kColumns, DType::float32, to, columns);
      }
    }
  }

  // out[all tokens, columns], summed over experts in ascending order.
  void down(const IntegerRows& between, int64_t column) {
    const int64_t columns = min_of(kColumns, e_.d - column);
    float* out = static_cast<float*>(scratch(kProduct, (e_.tokens + kRows) * kColumns * 4));
    float* product = out + e_.tokens * kColumns;
    int64_t* numbers = static_cast<int64_t*>(scratch(kNumbers, kRows * 8));
    std::fill(out, product, 0.0f);
    for (int64_t group = 0; group < groups_.count(); ++group) {
      const size_t first = groups_.firsts[static_cast<size_t>(group)],
                   last = groups_.firsts[static_cast<size_t>(group) + 1];
      const int64_t row = groups_.assignments[first].expert * e_.d + column;
      for (size_t r = first; r < last; r += kRows) {
        const int64_t some = min_of(kRows, static_cast<int64_t>(last - r));
        for (int64_t i = 0; i < some; ++i) numbers[i] = static_cast<int64_t>(r) + i;
        integers_.dot({&e_.down, row, columns, &between, numbers, some, product, kColumns});
        for (int64_t i = 0; i < some; ++i) {
          const Assignment& assignment = groups_.assignments[r + static_cast<size_t>(i)];
          table_.axpy(assignment.weight, product + i * kColumns, out + assignment.token * kColumns, columns);
        }
      }
    }
    for (int64_t t = 0; t < e_.tokens; ++t) {
      void* to = static_cast<char*>(e_.out) + (t * e_.d + column) * size_of(e_.dtype);
      table_.convert(DType::float32, out + t * kColumns, e_.dtype, to, columns);
    }
  }

  const IntegerTable& integers_;
  const Table& table_;
  const IntegerExperts& e_;
  const Groups groups_;
};

}  // namespace

const IntegerTable& integer_table(int isa) {
  const auto features = isa_features();
  const auto has = [&](const char* name) {
    return std::find(features.begin(), features.end(), name) != features.end();
  };
  switch (isa) {
    case 0:
      return integer_table_baseline();
#if defined(__x86_64__)
    case 1:
      if (isa_runs(Isa::avx2)) return integer_table_avx2();
      break;
    case 2:
      if (isa_runs(Isa::avx512) && has("avx512_vnni")) return integer_table_avx512vnni();
      break;
#endif
    default:
      break;
  }
  throw std::invalid_argument("this machine or build cannot run integer variant " + std::to_string(isa));
}

void integer_linear(const IntegerTable& integers, const Table& table, const IntegerLinear& job) {
  check(job.weights);
  if (job.rows == 0) return;
  const Quantized rows(integers, job.dtype, job.x, job.rows, job.x_stride, job.weights);
  const int64_t columns = job.weights.columns;
  parallel_for(ceil_div(columns, kColumns), [&](int64_t task) {
    const int64_t first = task * kColumns, count = min_of(kColumns, columns - first);
    float* product = static_cast<float*>(scratch(kProduct, (kRows + 1) * kColumns * 4));
    float* bias = product + kRows * kColumns;
    int64_t* numbers = static_cast<int64_t*>(scratch(kNumbers, kRows * 8));
    if (job.bias != nullptr) table.convert(job.dtype, at(job.bias, first, job.dtype), DType::float32, bias, count);
    for (int64_t r = 0; r < job.rows; r += kRows) {
      const int64_t some = min_of(kRows, job.rows - r);
      for (int64_t i = 0; i < some; ++i) numbers[i] = r + i;
      integers.dot({&job.weights, first, count, &rows.view, numbers, some, product, kColumns});
      for (int64_t i = 0; i < some; ++i) {
        float* from = product + i * kColumns;
        if (job.bias != nullptr) table.axpy(1.0f, bias, from, count);
        if (job.winners != nullptr) {
          contend(table, job.winners[r + i], from, count, first);
          continue;
        }
        void* to = static_cast<char*>(job.out) + ((r + i) * columns + first) * size_of(job.out_dtype);
        table.convert(DType::float32, from, job.out_dtype, to, count);
      }
    }
  });
}

void integer_fit(const IntegerTable& integers, DType dtype, const void* rows, const IntegerWeights& shape,
                 uint8_t* data, float* scales) {
  check(shape);
  parallel_for(ceil_div(shape.columns, kColumns), [&](int64_t task) {
    const int64_t first = task * kColumns, end = min_of(shape.columns, first + kColumns);
    for (int64_t c = first; c < end; ++c) {
      integers.fit(dtype, at(rows, c * shape.depth, dtype), shape, data + c * shape.row_bytes(),
                   scales + c * shape.row_scales());
    }
  });
}

void integer_moe(const IntegerTable& integers, const Table& table, const IntegerExperts& experts) {
  check(experts.gate_up);
  check(experts.down);
  if (experts.tokens > 0) IntegerMoe(integers, table, experts).run();
}

}  // namespace tokenrelay

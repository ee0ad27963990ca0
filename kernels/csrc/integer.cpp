#include "integer.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "pool.hpp"

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
  const int64_t chunks = job.weights.chunks();
  std::vector<int8_t> data(static_cast<size_t>(job.rows * chunks * kChunk));
  std::vector<float> scales(static_cast<size_t>(job.rows * chunks));
  std::vector<int32_t> zeros(scales.size() * 2 * kLanes);
  const IntegerRows rows{chunks, data.data(), scales.data(), zeros.data()};
  const auto quantize = [&](int64_t r) {
    integers.quantize(job.dtype, at(job.x, r * job.x_stride, job.dtype), job.weights, rows, r);
  };
  if (job.rows > 1) {
    parallel_for(job.rows, quantize);
  } else if (job.rows == 1) {
    quantize(0);
  }
  const int64_t columns = job.weights.columns;
  if (job.rows == 0) return;
  parallel_for(ceil_div(columns, kColumns), [&](int64_t task) {
    const int64_t first = task * kColumns, count = min_of(kColumns, columns - first);
    float* product = static_cast<float*>(scratch(kProduct, (kRows + 1) * kColumns * 4));
    float* bias = product + kRows * kColumns;
    int64_t* numbers = static_cast<int64_t*>(scratch(kNumbers, kRows * 8));
    if (job.bias != nullptr) table.convert(job.dtype, at(job.bias, first, job.dtype), DType::float32, bias, count);
    for (int64_t r = 0; r < job.rows; r += kRows) {
      const int64_t some = min_of(kRows, job.rows - r);
      for (int64_t i = 0; i < some; ++i) numbers[i] = r + i;
      integers.dot({&job.weights, first, count, &rows, numbers, some, product, kColumns});
      for (int64_t i = 0; i < some; ++i) {
        float* from = product + i * kColumns;
        if (job.bias != nullptr) table.axpy(1.0f, bias, from, count);
        void* to = static_cast<char*>(job.out) + ((r + i) * columns + first) * size_of(job.out_dtype);
        table.convert(DType::float32, from, job.out_dtype, to, count);
      }
    }
  });
}

}  // namespace tokenrelay

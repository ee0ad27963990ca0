#include "linear.hpp"

#include <vector>

#include "pool.hpp"
#include "winners.hpp"

namespace tokenrelay {
namespace {

constexpr int64_t kColumns = 32;  // of one task: 64 KiB of bfloat16 weights at a depth of 1,024
constexpr int64_t kRows = 64;     // that pass over a task's weights together

enum Use { kProduct, kAddresses };

const char* at(const void* base, int64_t elements, DType dtype) {
  return static_cast<const char*>(base) + elements * size_of(dtype);
}

class Product {
 public:
  Product(const Table& table, const Linear& job) : table_(table), job_(job), a_type_(table.q_type(job.dtype)) {}

  void run() {
    if (a_type_ != job_.dtype) widen();
    parallel_for(ceil_div(job_.columns, kColumns), [&](int64_t task) { columns(task * kColumns); });
  }

 private:
  void widen() {
    wide_.resize(static_cast<size_t>(job_.rows * job_.depth));
    for (int64_t r = 0; r < job_.rows; ++r) {
      table_.convert(job_.dtype, at(job_.x, r * job_.x_stride, job_.dtype), a_type_, wide_.data() + r * job_.depth,
                     job_.depth);
    }
  }

  const void* row(int64_t r) const {
    return wide_.empty() ? static_cast<const void*>(at(job_.x, r * job_.x_stride, job_.dtype))
                         : wide_.data() + r * job_.depth;
  }

  void columns(int64_t first) {
    const int64_t count = min_of(kColumns, job_.columns - first);
    const void** a =
        static_cast<const void**>(scratch(kAddresses, (kRows + kColumns) * static_cast<int64_t>(sizeof(void*))));
    const void** b = a + kRows;
    float* product = static_cast<float*>(scratch(kProduct, (kRows + 1) * kColumns * 4));
    float* bias = product + kRows * kColumns;
    for (int64_t c = 0; c < count; ++c) b[c] = at(job_.weight, (first + c) * job_.depth, job_.dtype);
    if (job_.bias != nullptr) {
      table_.convert(job_.dtype, at(job_.bias, first, job_.dtype), DType::float32, bias, count);
    }
    for (int64_t r = 0; r < job_.rows; r += kRows) {
      const int64_t rows = min_of(kRows, job_.rows - r);
      for (int64_t i = 0; i < rows; ++i) a[i] = row(r + i);
      table_.dot({job_.dtype, rows, count, job_.depth, a, b, product, kColumns});
      for (int64_t i = 0; i < rows; ++i) {
        float* from = product + i * kColumns;
        if (job_.bias != nullptr) table_.axpy(1.0f, bias, from, count);
        if (job_.winners != nullptr) {
          contend(table_, job_.winners[r + i], from, count, first);
          continue;
        }
        void* to = static_cast<char*>(job_.out) + ((r + i) * job_.columns + first) * size_of(job_.out_dtype);
        table_.convert(DType::float32, from, job_.out_dtype, to, count);
      }
    }
  }

  const Table& table_;
  const Linear& job_;
  const DType a_type_;
  std::vector<float> wide_;  // [rows, depth], where activations are wider than weights
};

}  // namespace

void linear(const Table& table, const Linear& job) {
  if (job.rows > 0) Product(table, job).run();
}

}  // namespace tokenrelay

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "expert_groups.hpp"
#include "packed_rows.hpp"
#include "pool.hpp"

namespace tokenrelay {
namespace {

constexpr int64_t kBlocks = 4;  // of a task
constexpr int64_t kColumns = kBlocks * kBlockColumns;

enum Use { kSums };

char* at(void* base, int64_t elements, DType dtype) { return static_cast<char*>(base) + elements * size_of(dtype); }

class PackedMoe {
 public:
  PackedMoe(const Table& table, const PackedExperts& e)
      : table_(table),
        e_(e),
        kernels_(packed_kernels(e.gate_up.bits)),
        groups_(group_by_expert(e.chosen, e.weights, e.tokens, e.top_k, e.experts)),
        hidden_type_(e.gate_up.bits == 16 ? DType::bfloat16 : DType::float32) {}

  void run() {
    const auto rows = static_cast<int64_t>(groups_.assignments.size());
    const PackedRows inputs(kernels_, e_.dtype, e_.x, e_.tokens, e_.x_stride, e_.gate_up);
    std::vector<char> hidden(static_cast<size_t>(rows * e_.f * size_of(hidden_type_)));
    const int64_t tasks = ceil_div(e_.f, kColumns);
    parallel_for(groups_.count() * tasks,
                 [&](int64_t i) { activate(inputs, i / tasks, i % tasks * kColumns, hidden.data()); });
    const PackedRows between(kernels_, hidden_type_, hidden.data(), rows, e_.f, e_.down);
    parallel_for(ceil_div(e_.d, kColumns), [&](int64_t i) { down(between, i * kColumns); });
  }

 private:
  size_t begin(int64_t group) const { return groups_.firsts[static_cast<size_t>(group)]; }

  // hidden[assignments of the group, columns] = silu(x . gate) * (x . up)
  void activate(const PackedRows& inputs, int64_t group, int64_t column, char* hidden) const {
    const size_t first = begin(group), last = begin(group + 1);
    const int64_t columns = min_of(kColumns, e_.f - column), blocks = columns / kBlockColumns;
    const int64_t gate_at = (groups_.assignments[first].expert * 2 * e_.f + column) / kBlockColumns;
    const int64_t up_at = gate_at + e_.f / kBlockColumns;
    alignas(64) float gate[kPackedRows * kColumns], up[kPackedRows * kColumns];
    for (size_t r = first; r < last; r += kPackedRows) {
      const int64_t some = min_of(kPackedRows, static_cast<int64_t>(last - r));
      const void* a[kPackedRows];
      for (int64_t i = 0; i < some; ++i) a[i] = inputs.row(groups_.assignments[r + static_cast<size_t>(i)].token);
      kernels_.dot({&e_.gate_up, gate_at, blocks, a, some, gate, kColumns});
      kernels_.dot({&e_.gate_up, up_at, blocks, a, some, up, kColumns});
      for (int64_t i = 0; i < some; ++i) {
        char* to = at(hidden, (static_cast<int64_t>(r) + i) * e_.f + column, hidden_type_);
        table_.silu_mul(DType::float32, gate + i * kColumns, up + i * kColumns, hidden_type_, to, columns);
      }
    }
  }

  // out[all tokens, columns], summed over experts in ascending order.
  void down(const PackedRows& between, int64_t column) const {
    const int64_t columns = min_of(kColumns, e_.d - column), blocks = columns / kBlockColumns;
    float* out = static_cast<float*>(scratch(kSums, e_.tokens * kColumns * 4));
    alignas(64) float product[kPackedRows * kColumns];
    std::fill(out, out + e_.tokens * kColumns, 0.0f);
    for (int64_t group = 0; group < groups_.count(); ++group) {
      const size_t first = begin(group), last = begin(group + 1);
      const int64_t block = (groups_.assignments[first].expert * e_.d + column) / kBlockColumns;
      for (size_t r = first; r < last; r += kPackedRows) {
        const int64_t some = min_of(kPackedRows, static_cast<int64_t>(last - r));
        const void* a[kPackedRows];
        for (int64_t i = 0; i < some; ++i) a[i] = between.row(static_cast<int64_t>(r) + i);
        kernels_.dot({&e_.down, block, blocks, a, some, product, kColumns});
        for (int64_t i = 0; i < some; ++i) {
          const Assignment& assignment = groups_.assignments[r + static_cast<size_t>(i)];
          table_.axpy(assignment.weight, product + i * kColumns, out + assignment.token * kColumns, columns);
        }
      }
    }
    for (int64_t t = 0; t < e_.tokens; ++t) {
      table_.convert(DType::float32, out + t * kColumns, e_.dtype, at(e_.out, t * e_.d + column, e_.dtype), columns);
    }
  }

  const Table& table_;
  const PackedExperts& e_;
  const PackedKernels& kernels_;
  const Groups groups_;
  const DType hidden_type_;
};

}  // namespace

void packed_moe(const Table& table, const PackedExperts& experts) {
  check(experts.gate_up);
  check(experts.down);
  if (experts.d % kBlockColumns != 0 || experts.f % kBlockColumns != 0) {
    throw std::invalid_argument("packed experts need widths that are multiples of 16");
  }
  if (experts.gate_up.bits != experts.down.bits) throw std::invalid_argument("packed experts are of one kind");
  if (experts.tokens > 0) PackedMoe(table, experts).run();
}

}  // namespace tokenrelay

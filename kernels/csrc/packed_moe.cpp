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
    std::vector<int64_t> tokens;
    for (const Assignment& assignment : groups_.assignments) tokens.push_back(assignment.token);
    const std::vector<char> gathered = inputs.gathered(tokens);
    std::vector<char> hidden(static_cast<size_t>(rows * e_.f * size_of(hidden_type_)));
    const int64_t tasks = ceil_div(e_.f, kColumns);
    parallel_for(groups_.count() * tasks, [&](int64_t i) {
      const int64_t next = i + threads();  // most likely this thread's
      activate(gathered.data(), inputs.length(), i / tasks, i % tasks * kColumns,
               next < groups_.count() * tasks ? gate_at(next / tasks, next % tasks * kColumns) : -1, hidden.data());
    });
    const PackedRows between(kernels_, hidden_type_, hidden.data(), rows, e_.f, e_.down);
    parallel_for(ceil_div(e_.d, kColumns), [&](int64_t i) { down(between, i * kColumns); });
  }

 private:
  int64_t begin(int64_t group) const { return static_cast<int64_t>(groups_.firsts[static_cast<size_t>(group)]); }
  const Assignment& assignment(int64_t row) const { return groups_.assignments[static_cast<size_t>(row)]; }

  // The first block of a group's gate from this column on, its up-projection's being f columns behind; and of its way
  // down.
  int64_t gate_at(int64_t group, int64_t column) const {
    return (assignment(begin(group)).expert * 2 * e_.f + column) / kBlockColumns;
  }
  int64_t down_at(int64_t group, int64_t column) const {
    return (assignment(begin(group)).expert * e_.d + column) / kBlockColumns;
  }

  // hidden[assignments of the group, columns] = silu(x . gate) * (x . up); `next`: the gate that is read after this
  // one.
  void activate(const char* inputs, int64_t step, int64_t group, int64_t column, int64_t next, char* hidden) const {
    const int64_t first = begin(group), columns = min_of(kColumns, e_.f - column), blocks = columns / kBlockColumns;
    const int64_t gates = gate_at(group, column), beside = e_.f / kBlockColumns, bytes = e_.gate_up.block_bytes();
    alignas(64) float gate[kPackedRowsMax * kColumns], up[kPackedRowsMax * kColumns];
    const Passes passes(begin(group + 1) - first, kernels_.rows);
    const auto dot = [&](int64_t pass, int64_t shift, float* out) {
      const int64_t r = first + passes.begin(pass), count = passes.begin(pass + 1) - passes.begin(pass);
      const char* after = next < 0 ? nullptr : e_.gate_up.data + (next + shift) * bytes;
      kernels_.dot({&e_.gate_up, gates + shift, blocks, inputs + r * step, step, count, out, kColumns,
                    passes.fetch(pass, after, blocks * bytes)});
    };
    for (int64_t pass = 0; pass < passes.count(); ++pass) {
      dot(pass, 0, gate);
      dot(pass, beside, up);
      for (int64_t r = passes.begin(pass), i = 0; r < passes.begin(pass + 1); ++r, ++i) {
        char* to = at(hidden, (first + r) * e_.f + column, hidden_type_);
        table_.silu_mul(DType::float32, gate + i * kColumns, up + i * kColumns, hidden_type_, to, columns);
      }
    }
  }

  // out[all tokens, columns], summed over experts in ascending order.
  void down(const PackedRows& between, int64_t column) const {
    const int64_t columns = min_of(kColumns, e_.d - column), blocks = columns / kBlockColumns;
    const int64_t bytes = e_.down.block_bytes();
    float* out = static_cast<float*>(scratch(kSums, e_.tokens * kColumns * 4));
    alignas(64) float product[kPackedRowsMax * kColumns];
    std::fill(out, out + e_.tokens * kColumns, 0.0f);
    for (int64_t group = 0; group < groups_.count(); ++group) {
      const char* next = group + 1 < groups_.count() ? e_.down.data + down_at(group + 1, column) * bytes : nullptr;
      const Passes passes(begin(group + 1) - begin(group), kernels_.rows);
      for (int64_t pass = 0; pass < passes.count(); ++pass) {
        const int64_t r = begin(group) + passes.begin(pass), count = begin(group) + passes.begin(pass + 1) - r;
        kernels_.dot({&e_.down, down_at(group, column), blocks, between.row(r), between.bytes(), count, product,
                      kColumns, passes.fetch(pass, next, blocks * bytes)});
        for (int64_t i = 0; i < count; ++i) {
          const Assignment& one = assignment(r + i);
          table_.axpy(one.weight, product + i * kColumns, out + one.token * kColumns, columns);
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

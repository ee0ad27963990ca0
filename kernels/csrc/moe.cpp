#include "moe.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "expert_groups.hpp"
#include "pool.hpp"

namespace tokenrelay {
namespace {

constexpr int64_t kHiddenBlock = 32;  // columns of a gate/up task
constexpr int64_t kOutBlock = 32;     // columns of a down task
constexpr int64_t kRowsBlock = 64;    // tokens of one expert that pass together

enum Use { kGate, kOut, kAddresses };

const char* at(const void* base, int64_t elements, DType dtype) {
  return static_cast<const char*>(base) + elements * size_of(dtype);
}
char* at(void* base, int64_t elements, DType dtype) { return static_cast<char*>(base) + elements * size_of(dtype); }

const void** addresses(int64_t count) {
  return static_cast<const void**>(scratch(kAddresses, count * static_cast<int64_t>(sizeof(void*))));
}

class Moe {
 public:
  Moe(const Table& table, const Experts& e)
      : table_(table),
        e_(e),
        groups_(group_by_expert(e.chosen, e.weights, e.tokens, e.top_k, e.experts)),
        a_type_(table.q_type(e.dtype)) {}

  void run() {
    const int64_t rows = static_cast<int64_t>(groups_.assignments.size());
    hidden_.resize(static_cast<size_t>(max_of(1, rows * e_.f * size_of(a_type_))));
    if (a_type_ != e_.dtype) widen_inputs();
    const int64_t blocks = ceil_div(e_.f, kHiddenBlock);
    parallel_for(groups_.count() * blocks, [&](int64_t i) { hidden(i / blocks, i % blocks * kHiddenBlock); });
    parallel_for(ceil_div(e_.d, kOutBlock), [&](int64_t i) { down(i * kOutBlock); });
  }

 private:
  void widen_inputs() {
    wide_.resize(static_cast<size_t>(e_.tokens * e_.d));
    for (int64_t t = 0; t < e_.tokens; ++t) {
      table_.convert(e_.dtype, at(e_.x, t * e_.x_stride, e_.dtype), a_type_, wide_.data() + t * e_.d, e_.d);
    }
  }

  const void* input(int64_t token) const {
    return a_type_ != e_.dtype ? static_cast<const void*>(wide_.data() + token * e_.d)
                               : at(e_.x, token * e_.x_stride, e_.dtype);
  }

  // hidden[assignments of the group, columns] = silu(x . gate) * (x . up)
  void hidden(int64_t group, int64_t column) {
    const size_t first = groups_.firsts[static_cast<size_t>(group)];
    const int64_t count = static_cast<int64_t>(groups_.firsts[static_cast<size_t>(group) + 1] - first);
    const int64_t columns = min_of(kHiddenBlock, e_.f - column);
    const int64_t expert = groups_.assignments[first].expert;
    float* gate = static_cast<float*>(scratch(kGate, 2 * kRowsBlock * kHiddenBlock * 4));
    float* up = gate + kRowsBlock * kHiddenBlock;
    const void** a = addresses(kRowsBlock + 2 * kHiddenBlock);
    const void **gates = a + kRowsBlock, **ups = gates + kHiddenBlock;
    for (int64_t c = 0; c < columns; ++c) {
      gates[c] = at(e_.gate_up, (expert * 2 * e_.f + column + c) * e_.d, e_.dtype);
      ups[c] = at(e_.gate_up, (expert * 2 * e_.f + e_.f + column + c) * e_.d, e_.dtype);
    }
    for (int64_t r = 0; r < count; r += kRowsBlock) {
      const int64_t rows = min_of(kRowsBlock, count - r);
      for (int64_t i = 0; i < rows; ++i) {
        a[i] = input(groups_.assignments[first + static_cast<size_t>(r + i)].token);
      }
      table_.dot({e_.dtype, rows, columns, e_.d, a, gates, gate, kHiddenBlock});
      table_.dot({e_.dtype, rows, columns, e_.d, a, ups, up, kHiddenBlock});
      for (int64_t i = 0; i < rows; ++i) {
        void* to = at(hidden_.data(), (static_cast<int64_t>(first) + r + i) * e_.f + column, a_type_);
        table_.silu_mul(DType::float32, gate + i * kHiddenBlock, up + i * kHiddenBlock, a_type_, to, columns);
      }
    }
  }

  // out[all tokens, columns], summed over experts in ascending order.
  void down(int64_t column) {
    const int64_t columns = min_of(kOutBlock, e_.d - column);
    float* out = static_cast<float*>(scratch(kOut, (e_.tokens + kRowsBlock) * kOutBlock * 4));
    float* product = out + e_.tokens * kOutBlock;
    std::fill(out, product, 0.0f);
    const void** a = addresses(kRowsBlock + kOutBlock);
    const void** rows_of_w = a + kRowsBlock;
    for (int64_t group = 0; group < groups_.count(); ++group) {
      const size_t first = groups_.firsts[static_cast<size_t>(group)];
      const int64_t count = static_cast<int64_t>(groups_.firsts[static_cast<size_t>(group) + 1] - first);
      const int64_t expert = groups_.assignments[first].expert;
      for (int64_t c = 0; c < columns; ++c) {
        rows_of_w[c] = at(e_.down, (expert * e_.d + column + c) * e_.f, e_.dtype);
      }
      for (int64_t r = 0; r < count; r += kRowsBlock) {
        const int64_t rows = min_of(kRowsBlock, count - r);
        for (int64_t i = 0; i < rows; ++i) {
          a[i] = at(hidden_.data(), (static_cast<int64_t>(first) + r + i) * e_.f, a_type_);
        }
        table_.dot({e_.dtype, rows, columns, e_.f, a, rows_of_w, product, kOutBlock});
        for (int64_t i = 0; i < rows; ++i) {
          const Assignment& assignment = groups_.assignments[first + static_cast<size_t>(r + i)];
          table_.axpy(assignment.weight, product + i * kOutBlock, out + assignment.token * kOutBlock, columns);
        }
      }
    }
    for (int64_t t = 0; t < e_.tokens; ++t) {
      table_.convert(DType::float32, out + t * kOutBlock, e_.dtype, at(e_.out, t * e_.d + column, e_.dtype), columns);
    }
  }

  const Table& table_;
  const Experts& e_;
  const Groups groups_;
  const DType a_type_;
  std::vector<char> hidden_;  // [assignments, f] of a_type_
  std::vector<float> wide_;   // [tokens, d], where activations are wider than weights
};

// Marks what may still be chosen, best first: the largest value, the lower index among equals.
int64_t take_best(const std::vector<float>& values, std::vector<char>& taken) {
  int64_t best = -1;
  for (size_t i = 0; i < values.size(); ++i) {
    if (taken[i] == 0 && (best < 0 || values[i] > values[static_cast<size_t>(best)])) best = static_cast<int64_t>(i);
  }
  taken[static_cast<size_t>(best)] = 1;
  return best;
}

float group_value(const float* ranked, int64_t size, bool top2) {
  float first = -std::numeric_limits<float>::infinity(), second = first;
  for (int64_t i = 0; i < size; ++i) {
    if (ranked[i] > first) {
      second = first;
      first = ranked[i];
    } else if (ranked[i] > second) {
      second = ranked[i];
    }
  }
  return top2 ? first + second : first;
}

void score(const Table& table, const Route& r, const float* logits, float* scores) {
  if (r.sigmoid) {
    table.sigmoid_array(logits, r.experts, scores);
    return;
  }
  const float top = *std::max_element(logits, logits + r.experts);
  table.exp_array(logits, r.experts, top, scores);
  double total = 0;
  for (int64_t i = 0; i < r.experts; ++i) total += static_cast<double>(scores[i]);
  const float factor = static_cast<float>(1.0 / total);
  for (int64_t i = 0; i < r.experts; ++i) scores[i] *= factor;
}

void route_token(const Table& table, const Route& r, int64_t token) {
  const size_t experts = static_cast<size_t>(r.experts);
  std::vector<float> scores(experts), ranked(experts);
  std::vector<char> taken(experts, 0);
  score(table, r, r.logits + token * r.stride, scores.data());
  for (size_t i = 0; i < experts; ++i) ranked[i] = scores[i] + (r.bias == nullptr ? 0.0f : r.bias[i]);
  if (r.groups > 1) {
    const int64_t size = r.experts / r.groups;
    std::vector<float> values(static_cast<size_t>(r.groups));
    std::vector<char> open(values.size(), 0);
    for (int64_t g = 0; g < r.groups; ++g) {
      values[static_cast<size_t>(g)] = group_value(ranked.data() + g * size, size, r.top2);
    }
    for (int64_t i = 0; i < r.groups_top_k; ++i) take_best(values, open);
    for (size_t i = 0; i < experts; ++i) taken[i] = open[i / static_cast<size_t>(size)] == 0 ? 1 : 0;
  }
  int32_t* chosen = r.chosen + token * r.top_k;
  float* weights = r.weights + token * r.top_k;
  float total = 0;
  for (int64_t i = 0; i < r.top_k; ++i) {
    const int64_t expert = take_best(ranked, taken);
    chosen[i] = static_cast<int32_t>(expert);
    weights[i] = scores[static_cast<size_t>(expert)];
    total += weights[i];
  }
  const float divisor = r.normalize ? total + 1e-20f : 1.0f;
  for (int64_t i = 0; i < r.top_k; ++i) weights[i] = weights[i] / divisor * r.scale;
}

}  // namespace

void moe(const Table& table, const Experts& experts) { Moe(table, experts).run(); }

void moe_route(const Table& table, const Route& r) {
  if (r.groups < 1 || r.experts % r.groups != 0) throw std::invalid_argument("experts must be a multiple of groups");
  if (r.groups_top_k < 1 || r.groups_top_k > r.groups) throw std::invalid_argument("groups_top_k is out of range");
  const int64_t open = r.groups > 1 ? r.experts / r.groups * r.groups_top_k : r.experts;
  if (r.top_k < 1 || r.top_k > open)
    throw std::invalid_argument("top_k is larger than the experts left to choose from");
  constexpr int64_t kTokens = 16;  // of one task
  parallel_for(ceil_div(r.tokens, kTokens), [&](int64_t task) {
    for (int64_t t = task * kTokens; t < min_of(r.tokens, (task + 1) * kTokens); ++t) route_token(table, r, t);
  });
}

}  // namespace tokenrelay

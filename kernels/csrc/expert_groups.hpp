// Which tokens each chosen expert has.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace tokenrelay {

// The choices, sorted by expert and, within one, by token.
struct Assignment {
  int64_t expert, token;
  float weight;
};

struct Groups {
  std::vector<Assignment> assignments;
  std::vector<size_t> firsts;  // of each chosen expert, and the end
  int64_t count() const { return static_cast<int64_t>(firsts.size()) - 1; }
};

// `chosen` and `weights` are [tokens, top_k]; -1: none. An expert out of range throws std::invalid_argument.
Groups group_by_expert(const int32_t* chosen, const float* weights, int64_t tokens, int64_t top_k, int64_t experts);

}  // namespace tokenrelay

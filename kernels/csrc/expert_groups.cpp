#include "expert_groups.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace tokenrelay {

Groups group_by_expert(const int32_t* chosen, const float* weights, int64_t tokens, int64_t top_k, int64_t experts) {
  Groups groups;
  for (int64_t i = 0; i < tokens * top_k; ++i) {
    const int64_t expert = chosen[i];
    if (expert == -1) continue;
    if (expert < -1 || expert >= experts) {
      throw std::invalid_argument("token " + std::to_string(i / top_k) + " chose expert " + std::to_string(expert) +
                                  " of " + std::to_string(experts));
    }
    groups.assignments.push_back({expert, i / top_k, weights[i]});
  }
  std::stable_sort(groups.assignments.begin(), groups.assignments.end(),
                   [](const Assignment& a, const Assignment& b) { return a.expert < b.expert; });
  for (size_t i = 0; i < groups.assignments.size(); ++i) {
    if (i == 0 || groups.assignments[i].expert != groups.assignments[i - 1].expert) groups.firsts.push_back(i);
  }
  groups.firsts.push_back(groups.assignments.size());
  return groups;
}

}  // namespace tokenrelay

#include "tokenrelay/scheduler/ngrams.hpp"

#include <algorithm>
#include <bit>

namespace tokenrelay::scheduler {

NgramIndex::NgramIndex(int order, std::size_t tokens_max)
    : order_(static_cast<std::size_t>(order)), tokens_max_(tokens_max), last_(static_cast<std::size_t>(tokens_min)) {
  TR_ASSERT(order >= 1 && order <= order_max && tokens_max >= static_cast<std::size_t>(tokens_min),
            "an index's bounds are checked by who makes it");
}

/// Of the `order` tokens before `end`.
std::size_t NgramIndex::bucket(std::size_t end) const noexcept {
  std::uint64_t hash = 0;
  for (std::size_t i = end - order_; i < end; ++i) hash = (hash ^ tokens_[i]) * 0x9e3779b97f4a7c15ULL;
  return static_cast<std::size_t>(hash >> 32) & (last_.size() - 1);
}

void NgramIndex::add(std::size_t end) noexcept {
  Place& last = last_[bucket(end)];
  before_[end] = last;
  last = static_cast<Place>(end);
}

/// All places anew. The last one of the text is none yet: nothing follows it.
void NgramIndex::rebuild() {
  before_.assign(tokens_.size() + 1, 0);
  last_.assign(std::max(last_.size(), std::bit_ceil(tokens_.size() + 1)), 0);
  for (std::size_t end = order_; end < tokens_.size(); ++end) add(end);
}

void NgramIndex::extend(std::span<const TokenId> tokens) {
  if (tokens.empty()) return;
  if (tokens.size() >= tokens_max_) {
    const auto kept = tokens.last(tokens_max_ / 2);
    tokens_.assign(kept.begin(), kept.end());
    return rebuild();
  }
  const std::size_t begin = tokens_.size();
  tokens_.insert(tokens_.end(), tokens.begin(), tokens.end());
  if (tokens_.size() > tokens_max_) {
    tokens_.erase(tokens_.begin(), tokens_.end() - static_cast<std::ptrdiff_t>(tokens_max_ / 2));
    return rebuild();
  }
  if (tokens_.size() >= last_.size()) return rebuild();
  before_.resize(tokens_.size() + 1, 0);
  for (std::size_t end = std::max(begin, order_); end < tokens_.size(); ++end) add(end);
}

/// Tokens before `place` that are the same as those at the end of the text.
int NgramIndex::matches(std::size_t place) const noexcept {
  const std::size_t most = std::min<std::size_t>(place, matched_max);
  std::size_t count = 0;
  while (count < most && tokens_[place - 1 - count] == tokens_[tokens_.size() - 1 - count]) ++count;
  return static_cast<int>(count);
}

NgramIndex::Found NgramIndex::find(std::span<TokenId> draft) const noexcept {
  const std::size_t end = tokens_.size();
  if (end <= order_ || draft.empty()) return {0, 0};
  std::size_t best = 0;
  int matched = static_cast<int>(order_) - 1;  // fewer have met by their hash only
  Place place = last_[bucket(end)];
  for (int i = 0; i < places_max && place != 0 && matched < matched_max; ++i, place = before_[place]) {
    const int same = matches(place);
    if (same > matched) {
      matched = same;
      best = place;
    }
  }
  if (best == 0) return {0, 0};
  for (std::size_t i = 0; i < draft.size(); ++i) {
    draft[i] = best + i < end ? tokens_[best + i] : draft[best + i - end];
  }
  return {draft.size(), matched};
}

}  // namespace tokenrelay::scheduler

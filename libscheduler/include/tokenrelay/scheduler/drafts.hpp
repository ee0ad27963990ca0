// Drafts: tokens that may come next in a sequence, as somebody guesses. A step computes them behind the token that is
// known and samples after each; those that equal what was sampled are kept (docs/scheduler.md, "Drafts").
// A draft is leased from a pool: its holder is a state of the request's machine, and cannot forget it.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "tokenrelay/scheduler/assert.hpp"
#include "tokenrelay/scheduler/siphash.hpp"

namespace tokenrelay::scheduler {

/// Tokens of one draft, at most. With the token before them they are no more than the smallest block holds, so a row
/// with a draft begins one new block at most.
inline constexpr int draft_tokens_max = 15;

class DraftPool {
 public:
  /// Having a draft. Linear: given back to the pool.
  class Lease {
   public:
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    Lease(Lease&& other) noexcept : index_(std::exchange(other.index_, -1)) {}
    Lease& operator=(Lease&& other) noexcept {
      TR_ASSERT(index_ < 0, "a draft was overwritten");
      index_ = std::exchange(other.index_, -1);
      return *this;
    }
    ~Lease() { TR_ASSERT(index_ < 0, "a draft was dropped"); }

   private:
    friend class DraftPool;
    explicit Lease(std::int32_t index) noexcept : index_(index) {}
    std::int32_t index_;
  };

  /// Room for `drafts` of them.
  explicit DraftPool(int drafts) : drafts_(static_cast<std::size_t>(drafts)) {
    free_.reserve(drafts_.size());
    for (auto index = static_cast<std::int32_t>(drafts); index-- > 0;) free_.push_back(index);
  }
  [[nodiscard]] int leased() const noexcept { return static_cast<int>(drafts_.size() - free_.size()); }

  /// The first `draft_tokens_max` of these tokens, of which there must be one. There is a draft for each slot.
  [[nodiscard]] Lease lease(std::span<const TokenId> tokens) noexcept {
    TR_ASSERT(!free_.empty() && !tokens.empty(), "a draft is of a sequence in a slot, and has a token");
    const std::int32_t index = free_.back();
    free_.pop_back();
    Draft& draft = drafts_[static_cast<std::size_t>(index)];
    draft.first = 0;
    draft.end = static_cast<std::uint8_t>(std::min<std::size_t>(tokens.size(), draft_tokens_max));
    std::copy_n(tokens.begin(), draft.end, draft.tokens.begin());
    return Lease(index);
  }
  [[nodiscard]] std::span<const TokenId> tokens(const Lease& lease) const noexcept {
    const Draft& draft = drafts_[at(lease)];
    return {draft.tokens.data() + draft.first, static_cast<std::size_t>(draft.end - draft.first)};
  }
  /// Its first token came true, and is no guess any more. One is left at least.
  void advance(const Lease& lease) noexcept {
    Draft& draft = drafts_[at(lease)];
    ++draft.first;
    TR_ASSERT(draft.first < draft.end, "a draft that is used up is given back");
  }
  void give_back(Lease&& lease) noexcept {
    free_.push_back(static_cast<std::int32_t>(at(lease)));
    lease.index_ = -1;
  }

 private:
  struct Draft {
    std::array<TokenId, draft_tokens_max> tokens;
    std::uint8_t first;
    std::uint8_t end;
  };
  static std::size_t at(const Lease& lease) noexcept {
    TR_ASSERT(lease.index_ >= 0, "a moved-from draft was used");
    return static_cast<std::size_t>(lease.index_);
  }
  std::vector<Draft> drafts_;
  std::vector<std::int32_t> free_;
};

}  // namespace tokenrelay::scheduler

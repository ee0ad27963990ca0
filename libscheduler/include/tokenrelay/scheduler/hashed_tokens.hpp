// The tokens of one sequence and the hashes of its full blocks. Each block is hashed once, when it is first asked for.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "tokenrelay/scheduler/assert.hpp"
#include "tokenrelay/scheduler/siphash.hpp"

namespace tokenrelay::scheduler {

class HashedTokens {
 public:
  HashedTokens() = default;
  /// Copies `tokens`; room for `tokens_max` is reserved, so that appending allocates nothing.
  HashedTokens(const HashKey& key, const Hash128& root, int block_tokens, std::span<const TokenId> tokens,
               std::size_t tokens_max)
      : key_(key), root_(root), width_(static_cast<std::size_t>(block_tokens)) {
    tokens_.reserve(tokens_max);
    tokens_.assign(tokens.begin(), tokens.end());
    hashes_.reserve(tokens_max / width_);
  }

  [[nodiscard]] std::span<const TokenId> tokens() const noexcept { return tokens_; }
  [[nodiscard]] int size() const noexcept { return static_cast<int>(tokens_.size()); }
  void append(TokenId token) noexcept {
    TR_ASSERT(tokens_.size() < tokens_.capacity(), "a sequence is longer than its limit");
    tokens_.push_back(token);
  }

  /// Of the full block at `index`, all of whose tokens must be known.
  [[nodiscard]] Hash128 hash(std::size_t index) noexcept {
    TR_ASSERT((index + 1) * width_ <= tokens_.size(), "a block is hashed before its tokens are known");
    while (hashes_.size() <= index) {
      const std::size_t at = hashes_.size();
      const Hash128& parent = at == 0 ? root_ : hashes_[at - 1];
      hashes_.push_back(chain_hash(key_, parent, tokens().subspan(at * width_, width_)));
    }
    return hashes_[index];
  }

 private:
  HashKey key_;
  Hash128 root_;
  std::size_t width_ = 1;
  std::vector<TokenId> tokens_;
  std::vector<Hash128> hashes_;
};

}  // namespace tokenrelay::scheduler

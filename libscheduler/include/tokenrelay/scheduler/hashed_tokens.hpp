// The tokens of one sequence and the hashes of its full blocks. Each block is hashed once, when it is first asked for.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <span>
#include <utility>
#include <vector>

#include "tokenrelay/scheduler/assert.hpp"
#include "tokenrelay/scheduler/lineage.hpp"
#include "tokenrelay/scheduler/siphash.hpp"

namespace tokenrelay::scheduler {

class HashedTokens {
 public:
  HashedTokens() = default;
  /// Copies `tokens`; room for `tokens_max` is reserved, so that appending allocates nothing. It is rounded up, so that
  /// next turns find room too: what nobody writes costs addresses, not memory.
  HashedTokens(const HashKey& key, const Hash128& root, int block_tokens, std::span<const TokenId> tokens,
               std::size_t tokens_max)
      : key_(key), root_(root), width_(static_cast<std::size_t>(block_tokens)) {
    reserve(tokens_max);
    tokens_.assign(tokens.begin(), tokens.end());
  }

  /// Room for `tokens_max` tokens and their hashes. Everything else here allocates nothing.
  void reserve(std::size_t tokens_max) {
    if (tokens_max <= tokens_.capacity() && tokens_max / width_ <= hashes_.capacity()) return;
    const std::size_t room = std::bit_ceil(tokens_max);
    hashes_.reserve(room / width_);
    tokens_.reserve(room);
  }
  /// A copy of the first `length` tokens, with room for `tokens_max`.
  [[nodiscard]] HashedTokens beginning(std::size_t length, std::size_t tokens_max) const {
    HashedTokens copy;
    copy.key_ = key_;
    copy.root_ = root_;
    copy.width_ = width_;
    copy.reserve(tokens_max);
    copy.tokens_.assign(tokens_.begin(), tokens_.begin() + static_cast<std::ptrdiff_t>(length));
    const std::size_t hashed = std::min(hashes_.size(), length / width_);
    copy.hashes_.assign(hashes_.begin(), hashes_.begin() + static_cast<std::ptrdiff_t>(hashed));
    return copy;
  }
  /// Keeps the first `length` tokens, and the hashes of their full blocks.
  void truncate(std::size_t length) noexcept {
    TR_ASSERT(length <= tokens_.size(), "a text is not shorter than what it keeps");
    tokens_.resize(length);
    hashes_.resize(std::min(hashes_.size(), length / width_));
  }
  void extend(std::span<const TokenId> tokens) noexcept {
    TR_ASSERT(tokens_.size() + tokens.size() <= tokens_.capacity(), "a sequence is longer than its limit");
    tokens_.insert(tokens_.end(), tokens.begin(), tokens.end());
  }
  /// Gives back room that is many times what the text needs (one that was to be long and ended early).
  void trim() noexcept {
    if (tokens_.capacity() <= 4 * tokens_.size() + trim_min) return;
    tokens_.shrink_to_fit();  // does not throw (libstdc++ and libc++ keep the vector as it is)
    hashes_.shrink_to_fit();
  }
  /// Tokens that there is room for.
  [[nodiscard]] std::size_t capacity() const noexcept { return tokens_.capacity(); }
  [[nodiscard]] const Hash128& root() const noexcept { return root_; }

  [[nodiscard]] std::span<const TokenId> tokens() const noexcept { return tokens_; }
  [[nodiscard]] int size() const noexcept { return static_cast<int>(tokens_.size()); }
  void append(TokenId token) noexcept {
    TR_ASSERT(tokens_.size() < tokens_.capacity(), "a sequence is longer than its limit");
    tokens_.push_back(token);
  }

  /// How many blocks have a known hash.
  [[nodiscard]] std::size_t hashes() const noexcept { return hashes_.size(); }
  /// The hash of the next block is known from elsewhere, where the same tokens have the same parent.
  void adopt(const Hash128& hash) noexcept { hashes_.push_back(hash); }
  [[nodiscard]] std::span<const TokenId> block(std::size_t index) const noexcept {
    return tokens().subspan(index * width_, width_);
  }
  [[nodiscard]] Content content(std::size_t index) noexcept {
    const Hash128 own = hash(index);
    return {own, index == 0 ? root_ : hashes_[index - 1], block(index)};
  }
  /// The tokens before `end` behind the full blocks, hashed as a block of their own would be; `end` is in no full
  /// block.
  [[nodiscard]] Content rest(std::size_t end) noexcept {
    const std::size_t index = end / width_;
    const Hash128 parent = index == 0 ? root_ : hash(index - 1);
    const auto tokens = this->tokens().subspan(index * width_, end % width_);
    return {chain_hash(key_, parent, tokens), parent, tokens};
  }
  /// Blocks hashed since the last call.
  [[nodiscard]] std::uint64_t take_hashed() noexcept { return std::exchange(hashed_, 0); }

  /// Of the full block at `index`, all of whose tokens must be known.
  [[nodiscard]] Hash128 hash(std::size_t index) noexcept {
    TR_ASSERT((index + 1) * width_ <= tokens_.size(), "a block is hashed before its tokens are known");
    while (hashes_.size() <= index) {
      const std::size_t at = hashes_.size();
      const Hash128& parent = at == 0 ? root_ : hashes_[at - 1];
      hashes_.push_back(chain_hash(key_, parent, block(at)));
      ++hashed_;
    }
    return hashes_[index];
  }

 private:
  static constexpr std::size_t trim_min = 1024;  // not worth the copy

  HashKey key_;
  Hash128 root_;
  std::size_t width_ = 1;
  std::vector<TokenId> tokens_;
  std::vector<Hash128> hashes_;
  std::uint64_t hashed_ = 0;
};

}  // namespace tokenrelay::scheduler

// What blocks hold, so that a next turn hashes only what it appended: the tokens of every hashed block, its parent's
// hash, and which block followed it last. A prompt that begins like an earlier one walks from child to child and
// compares tokens, which gives the same hashes without computing them. A hint is never trusted: what does not compare
// is hashed.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <span>
#include <vector>

#include "tokenrelay/scheduler/block.hpp"

namespace tokenrelay::scheduler {

/// What a full block holds: its tokens, and its place in the chain of hashes.
struct Content {
  Hash128 hash;
  Hash128 parent;
  std::span<const TokenId> tokens;
};

class Lineage {
 public:
  Lineage(std::size_t blocks, std::size_t block_tokens)
      : width_(block_tokens), tokens_(blocks * block_tokens), parents_(blocks), children_(blocks, no_block) {
    begins_.fill(no_block);
  }

  /// The block has, or will have, this content: a whole block's, or the end of a text.
  void remember(BlockId id, const Content& content) noexcept {
    TR_ASSERT(content.tokens.size() <= width_, "a block holds no more tokens than it has room for");
    std::copy(content.tokens.begin(), content.tokens.end(), tokens_.begin() + offset(id));
    parents_[at(id)] = content.parent;
    children_[at(id)] = no_block;
  }
  /// What the block's parent has as hash; of a block that was remembered.
  [[nodiscard]] const Hash128& parent(BlockId id) const noexcept { return parents_[at(id)]; }
  void follow(BlockId parent, BlockId child) noexcept { children_[at(parent)] = child; }
  /// The block has no parent in the index: it begins a text.
  void begin(BlockId id) noexcept { begins_[place(parents_[at(id)])] = id; }

  /// The block that followed last after this one, or no_block; what it holds now may be something else.
  [[nodiscard]] BlockId next(BlockId id) const noexcept { return children_[at(id)]; }
  /// The block that followed last after one with hash `parent`, if it holds just these tokens.
  [[nodiscard]] BlockId child(BlockId id, const Hash128& parent, std::span<const TokenId> tokens,
                              const block::Records& records) const noexcept {
    const BlockId child = children_[at(id)];
    if (child == no_block || !records[at(child)].indexed || !(parents_[at(child)] == parent)) return no_block;
    if (records[at(child)].part > 0) return no_block;
    return std::equal(tokens.begin(), tokens.end(), tokens_.begin() + offset(child)) ? child : no_block;
  }

  /// The block that followed last after the one with hash `parent` (no_block: that is a root), and how many tokens it
  /// begins with that these begin with, too. What it is now is for the caller to see.
  struct Alike {
    BlockId id = no_block;
    std::size_t tokens = 0;
  };
  [[nodiscard]] Alike alike(BlockId id, const Hash128& parent, std::span<const TokenId> tokens,
                            const block::Records& records) const noexcept {
    const BlockId child = id == no_block ? begins_[place(parent)] : children_[at(id)];
    if (child == no_block || !(parents_[at(child)] == parent)) return {};
    const auto first = tokens_.begin() + offset(child);
    const std::size_t size = records[at(child)].part > 0 ? records[at(child)].part : width_;
    const auto same = std::mismatch(tokens.begin(), tokens.end(), first, first + static_cast<std::ptrdiff_t>(size));
    return {child, static_cast<std::size_t>(same.first - tokens.begin())};
  }

  /// Without the tokens themselves.
  [[nodiscard]] std::size_t bytes() const noexcept {
    return parents_.capacity() * sizeof(Hash128) + children_.capacity() * sizeof(BlockId);
  }
  [[nodiscard]] std::size_t token_bytes() const noexcept { return tokens_.capacity() * sizeof(TokenId); }

 private:
  static constexpr std::size_t roots = 64;  // whose last beginning is known: tenants, mostly one

  static std::size_t at(BlockId id) noexcept { return static_cast<std::size_t>(id); }
  static std::size_t place(const Hash128& root) noexcept { return static_cast<std::size_t>(root.low % roots); }
  [[nodiscard]] std::ptrdiff_t offset(BlockId id) const noexcept {
    return static_cast<std::ptrdiff_t>(id) * static_cast<std::ptrdiff_t>(width_);
  }

  std::size_t width_;
  std::vector<TokenId> tokens_;  // [blocks, block_tokens]
  std::vector<Hash128> parents_;
  std::vector<BlockId> children_;        // the one that followed last
  std::array<BlockId, roots> begins_{};  // likewise, after a root
};

}  // namespace tokenrelay::scheduler

// Where the last tokens of a text stood before, and what followed them: drafts without a model (prompt lookup decoding,
// https://github.com/apoorvumang/prompt-lookup-decoding). An agent's answer repeats its context: code it edits, names,
// tool results.
//
//     NgramIndex index(3, 1 << 17);
//     index.extend(prompt);
//     const auto found = index.find(room);      // the first found.tokens of `room` are the draft
//     index.extend({&token, 1});                // at every token
//
// A token costs O(1) to add, a draft a bounded number of comparisons, whatever the length of the text. 12 to 16 bytes a
// token, of the last `tokens_max` tokens at most.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "tokenrelay/scheduler/drafts.hpp"

namespace tokenrelay::scheduler {

class NgramIndex {
 public:
  static constexpr int order_max = 16;
  static constexpr std::int64_t tokens_min = 64;

  /// `order`: tokens that must be the same for a place to count. `tokens_max`: of the text, the latest ones; older ones
  /// are forgotten by half of that at once.
  NgramIndex(int order, std::size_t tokens_max);

  void extend(std::span<const TokenId> tokens);

  struct Found {
    std::size_t tokens;  // of the draft; 0: nothing was found
    int matched;         // tokens before it that are the same in both places, `matched_max` at most
  };
  /// Fills `draft` with what followed the last tokens where they stood before: of the latest `places_max` places the
  /// one with the most tokens in common, of equal ones the latest. A draft that reaches the end of the text goes on
  /// with itself, as a text that repeats itself does.
  [[nodiscard]] Found find(std::span<TokenId> draft) const noexcept;

  /// Tokens that it remembers.
  [[nodiscard]] std::size_t size() const noexcept { return tokens_.size(); }
  /// Memory that it takes.
  [[nodiscard]] std::size_t bytes() const noexcept {
    return (tokens_.capacity() + before_.capacity() + last_.capacity()) * sizeof(std::uint32_t);
  }

  static constexpr int places_max = 16;
  static constexpr int matched_max = 32;

 private:
  using Place = std::uint32_t;  // the number of tokens before it; 0: none
  [[nodiscard]] std::size_t bucket(std::size_t end) const noexcept;
  [[nodiscard]] int matches(std::size_t place) const noexcept;
  void add(std::size_t end) noexcept;
  void rebuild();

  std::size_t order_;
  std::size_t tokens_max_;
  std::vector<TokenId> tokens_;
  std::vector<Place> before_;  // by place: the one before it in the same bucket
  std::vector<Place> last_;    // by hash of the last `order` tokens; a power of two of them, no fewer than tokens
};

}  // namespace tokenrelay::scheduler

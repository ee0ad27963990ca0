// The texts of sequences that ended, so that the next turn of a session names its parent and brings only what it
// appended. The text, with its hashes, goes on to the child; it is not copied. What the parent had is then looked up in
// the child (`heir`), so that a second child of the same parent is served too, by a copy.
//
//     turns.keep(id, ticket, std::move(text));                          // at the end of a sequence
//     if (Turns::Turn* turn = turns.find(id)) HashedTokens text = turns.hand_on(*turn, length, child, child_ticket);
//
// Bounded twice: in entries, and in the tokens that they have room for; the oldest go first. Allocates nothing after
// construction.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "tokenrelay/scheduler/hashed_tokens.hpp"
#include "tokenrelay/scheduler/id_map.hpp"

namespace tokenrelay::scheduler {

class Turns {
 public:
  /// A sequence that ended. A ticket is never used twice, an id may be: what names an heir is both.
  struct Turn {
    std::uint64_t id = 0;
    std::uint64_t ticket = 0;
    HashedTokens text;       // empty when it was handed on
    std::size_t room = 0;    // tokens that `text` was charged for
    std::size_t begins = 0;  // handed on: so many tokens of this turn are the beginning of its heir's text
    std::uint64_t heir = 0;
    std::uint64_t heir_ticket = 0;  // 0: it has its own text
  };

  Turns(std::size_t turns_max, std::size_t tokens_max) : turns_(turns_max), tokens_max_(tokens_max), ids_(turns_max) {}

  /// The last sequence of this id that ended, or nullptr when that was too long ago.
  [[nodiscard]] Turn* find(std::uint64_t id) noexcept {
    const std::int32_t at = ids_.find(id);
    return at == IdMap::none ? nullptr : &turns_[static_cast<std::size_t>(at)];
  }

  /// A sequence ended. A text that is larger than all that may be kept is dropped.
  void keep(std::uint64_t id, std::uint64_t ticket, HashedTokens&& text) noexcept {
    text.trim();
    const std::size_t room = text.capacity();
    if (room > tokens_max_) return;
    while (size_ == turns_.size() || tokens_ + room > tokens_max_) drop_oldest();
    const std::size_t at = (first_ + size_++) % turns_.size();
    turns_[at] = {id, ticket, std::move(text), room, 0, 0, 0};
    tokens_ += room;
    ids_.set(id, static_cast<std::int32_t>(at));
  }

  /// The text goes on to a child that begins with the first `length` tokens of it.
  [[nodiscard]] HashedTokens hand_on(Turn& turn, std::size_t length, std::uint64_t heir,
                                     std::uint64_t heir_ticket) noexcept {
    TR_ASSERT(turn.heir_ticket == 0, "a text is handed on once");
    tokens_ -= std::exchange(turn.room, 0);
    turn.begins = length;
    turn.heir = heir;
    turn.heir_ticket = heir_ticket;
    HashedTokens text = std::move(turn.text);
    turn.text = HashedTokens();
    text.truncate(length);
    return text;
  }

  [[nodiscard]] std::size_t size() const noexcept { return size_; }
  /// Room of the texts that are kept, in tokens.
  [[nodiscard]] std::size_t tokens() const noexcept { return tokens_; }

 private:
  void drop_oldest() noexcept {
    TR_ASSERT(size_ > 0, "there is nothing left to drop");
    Turn& turn = turns_[first_];
    // The same id may have ended again since: then the map points to its later turn.
    if (ids_.find(turn.id) == static_cast<std::int32_t>(first_)) ids_.erase(turn.id);
    tokens_ -= turn.room;
    turn = {};
    first_ = (first_ + 1) % turns_.size();
    --size_;
  }

  std::vector<Turn> turns_;  // a ring
  std::size_t first_ = 0;
  std::size_t size_ = 0;
  std::size_t tokens_ = 0;
  std::size_t tokens_max_;
  IdMap ids_;
};

}  // namespace tokenrelay::scheduler

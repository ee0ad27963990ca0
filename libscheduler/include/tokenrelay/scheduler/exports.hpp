// What a worker offers to its peers: the handle of each sequence that is handed over, in the states of handle.hpp. A
// handle holds pins of its own on the blocks that a peer may read, so that they outlive their sequence, and leaves the
// table only by the transitions that give them back.
//
//     exports.reserve(sequence_id, blocks_max);                     // at submission; the only thing that allocates
//     exports.seal(sequence_id, std::move(pins));                   // as blocks become readable
//     auto refused = exports.apply(sequence_id, HandleEvent::claim, pool);
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "tokenrelay/scheduler/handle.hpp"
#include "tokenrelay/scheduler/id_map.hpp"
#include "tokenrelay/scheduler/pool.hpp"
#include "tokenrelay/scheduler/types.hpp"

namespace tokenrelay::scheduler {

class Exports {
 public:
  explicit Exports(std::size_t handles_max) : handles_(handles_max), ids_(handles_max) {
    for (std::size_t at = handles_max; at-- > 0;) vacant_.push_back(static_cast<std::int32_t>(at));
  }

  [[nodiscard]] bool full() const noexcept { return vacant_.empty(); }
  [[nodiscard]] bool contains(std::uint64_t id) const noexcept { return ids_.find(id) != IdMap::none; }
  [[nodiscard]] int size() const noexcept { return static_cast<int>(handles_.size() - vacant_.size()); }
  /// Of the handle that `contains` found: what a peer may read, in the order of the sequence's tokens.
  [[nodiscard]] std::span<const SealedPin> pins(std::uint64_t id) const noexcept;
  /// Every pin of every handle, for the integrity check.
  template <class Visit>
  void for_each_pin(Visit&& visit) const {
    for (const Slot& slot : handles_) {
      if (const handle::Stake* stake = stake_of(slot)) {
        for (const SealedPin& pin : stake->pins()) visit(read(pin));
      }
    }
  }
  /// A new handle for a sequence that has none, with room for `blocks_max` pins. Not when it is full.
  void reserve(std::uint64_t id, std::size_t blocks_max);
  /// More blocks can be read. A handle that is over, or whose claim is, takes none: the pins are given back.
  void seal(std::uint64_t id, handle::Stake&& sealed, BlockPool& pool) noexcept;
  /// Moves a handle. What refuses it, or nothing; a handle that ends gives its pins back and is gone.
  [[nodiscard]] std::optional<std::string_view> apply(std::uint64_t id, HandleEvent event, BlockPool& pool) noexcept;
  /// The owner's life is over.
  void lose_all(BlockPool& pool) noexcept;
  /// Where the handle is, as its table calls it; empty when there is none.
  [[nodiscard]] std::string_view state(std::uint64_t id) const noexcept;

 private:
  using Slot = fsm::Slot<HandleFsm>;
  static const handle::Stake* stake_of(const Slot& slot) noexcept {
    return std::visit(
        []<class S>(const S& state) -> const handle::Stake* {
          if constexpr (handle::Holds<S>) {
            return &state.stake;
          } else {
            return nullptr;
          }
        },
        slot);
  }
  std::optional<fsm::Rejected> send(Slot& slot, HandleEvent event, handle::Stake& freed) noexcept;

  std::vector<Slot> handles_;
  std::vector<std::int32_t> vacant_;
  IdMap ids_;  // of sequences that have a handle
};

}  // namespace tokenrelay::scheduler

// Evicted blocks that the reuse model still watches: hash, kind and the time of the last use, without the block. So a
// kind that is evicted young can still show that it comes back. Only a sample of all hashes is watched, in a ring of
// fixed size: the oldest is given up on when there is no room.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "tokenrelay/scheduler/reuse.hpp"
#include "tokenrelay/scheduler/siphash.hpp"

namespace tokenrelay::scheduler {

class Ghosts {
 public:
  struct Ghost {
    std::int64_t used_us = 0;
    std::uint8_t uses = 0;
    ReuseKind kind = 0;
  };

  /// For a pool of so many blocks. From a thousand on one hash in eight is watched, from 16,384 on one in 32: enough to
  /// learn from, and most blocks cost nothing. Those that are evicted are watched for four times the pool and longer.
  explicit Ghosts(std::size_t blocks)
      : sample_(blocks < 1024    ? 0
                : blocks < 16384 ? 7
                                 : 31),
        ring_(4 * blocks / (sample_ + 1)),
        cells_(2 * ring_.size()) {}

  [[nodiscard]] bool sampled(const Hash128& hash) const noexcept { return (hash.high & sample_) == 0; }
  [[nodiscard]] std::size_t bytes() const noexcept {
    return ring_.capacity() * sizeof(Place) + cells_.capacity() * sizeof(std::uint32_t);
  }

  /// Watches an evicted block. Gives the oldest one when it must make room.
  std::optional<Ghost> add(const Hash128& hash, const Ghost& ghost) noexcept {
    std::optional<Ghost> dropped;
    Place& place = ring_[next_];
    if (place.tag != 0) {
      dropped = unpack(place.packed);
      erase(next_);
    }
    place = {tag(hash), pack(ghost)};
    std::size_t at = home(place.tag);
    while (cells_[at] != 0) at = after(at);
    cells_[at] = static_cast<std::uint32_t>(next_ + 1);
    next_ = next_ + 1 == ring_.size() ? 0 : next_ + 1;
    return dropped;
  }

  /// Takes the block out, if it is watched.
  std::optional<Ghost> take(const Hash128& hash) noexcept {
    const std::uint64_t wanted = tag(hash);
    for (std::size_t at = home(wanted); cells_[at] != 0; at = after(at)) {
      const std::size_t place = cells_[at] - 1;
      if (ring_[place].tag != wanted) continue;
      const Ghost found = unpack(ring_[place].packed);
      erase(place);
      return found;
    }
    return std::nullopt;
  }

 private:
  struct Place {
    std::uint64_t tag = 0;     // of the hash; 0: taken out
    std::uint64_t packed = 0;  // 48 bits of microseconds (nine years), 8 of uses, 8 of kind
  };
  static std::uint64_t pack(const Ghost& ghost) noexcept {
    return static_cast<std::uint64_t>(ghost.used_us) << 16U | static_cast<std::uint64_t>(ghost.uses) << 8U | ghost.kind;
  }
  static Ghost unpack(std::uint64_t packed) noexcept {
    return {static_cast<std::int64_t>(packed >> 16U), static_cast<std::uint8_t>(packed >> 8U & 0xffU),
            static_cast<ReuseKind>(packed & 0xffU)};
  }
  static std::uint64_t tag(const Hash128& hash) noexcept { return hash.low | 1U; }
  [[nodiscard]] std::size_t home(std::uint64_t tag) const noexcept {
    return static_cast<std::size_t>((tag >> 32) * cells_.size() >> 32);
  }
  [[nodiscard]] std::size_t after(std::size_t at) const noexcept { return at + 1 == cells_.size() ? 0 : at + 1; }
  [[nodiscard]] std::size_t distance(std::size_t from, std::size_t to) const noexcept {
    return to >= from ? to - from : to + cells_.size() - from;
  }

  void erase(std::size_t place) noexcept {
    std::size_t hole = home(ring_[place].tag);
    while (cells_[hole] != place + 1) hole = after(hole);
    for (std::size_t at = after(hole); cells_[at] != 0; at = after(at)) {
      if (distance(home(ring_[cells_[at] - 1].tag), at) < distance(hole, at)) continue;
      cells_[hole] = cells_[at];
      hole = at;
    }
    cells_[hole] = 0;
    ring_[place].tag = 0;
  }

  std::uint64_t sample_;
  std::vector<Place> ring_;
  std::vector<std::uint32_t> cells_;  // place in the ring + 1; 0: empty
  std::size_t next_ = 0;
};

}  // namespace tokenrelay::scheduler

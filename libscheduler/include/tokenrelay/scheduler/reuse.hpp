// Which cached blocks come back, and after how long: learned while serving, it orders eviction.
//
//     model.idle(kind);                          // the last reader left a block of this kind
//     model.reused(kind, idle_us);               // somebody wanted it again
//     model.gone(kind, idle_us);                 // it is no longer watched: nobody came for so long
//     double rate = model.rate(kind, idle_us);   // evict the block with the lowest
//
// A kind is what the scheduler itself knows of a block: whose it was (Origin) and how often it was wanted again. For
// each kind two decayed histograms of idle times, in half octaves, say how many came back and how many were given up
// on. `rate` is the Gittins index of what they say: the most reuses per microsecond of keeping the block that any
// horizon promises, given that it has been idle so long. (Aalto, Ayesta, Righter, "On the Gittins index in the M/G/1
// queue", 2009; Beckmann, Chen, Cidon, "LHD: improving cache hit rate by maximizing hit density", NSDI 2018.)
// What nobody has seen yet looks the same for all kinds and falls with the idle time: then the order is that of LRU.
//
// Integer counts and the same arithmetic in the same order: equal calls give equal answers. Nothing is allocated.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace tokenrelay::scheduler {

/// Whose a block was when its last reader left. Nothing here is taken from a client but `tool_turn`, a hint: whoever
/// gives it wrongly spoils the statistics of that kind alone.
enum class Origin : std::uint8_t {
  prompt,     // of a prompt that found less than half of itself in the cache: a first turn, or a one-off
  turn,       // of a prompt that found half of itself or more, or named its parent: a session goes on
  output,     // sampled here
  tool_turn,  // of a sequence that was submitted with tools to call: an agent will come back with the results
};
inline constexpr std::array<std::string_view, 4> origin_names{"prompt", "turn", "output", "tool_turn"};

/// A kind of block: its origin, and how often it was wanted again: never, once, two or three times, more often.
using ReuseKind = std::uint8_t;
inline constexpr int reuse_levels = 4;
inline constexpr int reuse_kinds = static_cast<int>(origin_names.size()) * reuse_levels;
[[nodiscard]] constexpr ReuseKind reuse_kind(Origin origin, int uses) noexcept {
  const int level = uses <= 1 ? uses : uses <= 3 ? 2 : 3;
  return static_cast<ReuseKind>(static_cast<int>(origin) * reuse_levels + level);
}

class ReuseModel {
 public:
  static constexpr int buckets = 64;

  ReuseModel() noexcept;
  void clock(std::int64_t now_us) noexcept {
    if (first_us_ < 0) first_us_ = now_us;
    now_us_ = now_us;
  }
  void idle(ReuseKind kind) noexcept { ++kinds_[kind].watched; }
  void reused(ReuseKind kind, std::int64_t idle_us) noexcept;
  void gone(ReuseKind kind, std::int64_t idle_us) noexcept;
  /// Expected reuses per microsecond from here on.
  [[nodiscard]] double rate(ReuseKind kind, std::int64_t idle_us) const noexcept;

  /// Half octaves of milliseconds (of 1024 us): bucket 0 begins at 0, the last one has no end.
  [[nodiscard]] static int bucket_of(std::int64_t idle_us) noexcept;
  [[nodiscard]] static double begin_us(int bucket) noexcept;
  /// What was seen of a kind, decayed: how many came back, how many were given up on, how many are watched now.
  struct Seen {
    double reused = 0;
    double gone = 0;
    std::int64_t watched = 0;
  };
  [[nodiscard]] Seen seen(ReuseKind kind) const noexcept;

 private:
  struct Kind {
    std::array<float, buckets> reused{};
    std::array<float, buckets> gone{};
    std::array<double, buckets> rate{};
    std::int64_t watched = 0;
    int fresh = 0;  // observations since the rates were computed
    int fits = 0;   // counted up to a few
  };
  void observed(Kind& kind) noexcept;
  void fit(Kind& kind) const noexcept;

  std::array<Kind, reuse_kinds> kinds_;
  std::int64_t now_us_ = 0;
  std::int64_t first_us_ = -1;
  std::int64_t longest_us_ = 0;  // for how long blocks are watched, once the first were given up on
};

}  // namespace tokenrelay::scheduler

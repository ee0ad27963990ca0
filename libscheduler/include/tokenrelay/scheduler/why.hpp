// Why a sequence is where it is: what was decided about it last. One byte, set where it is decided; the words are for a
// person who asks.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace tokenrelay::scheduler {

enum class Why : std::uint8_t {
  none,
  // It waits.
  waits_blocks,
  waits_prefix,
  waits_step,
  waits_floor,
  waits_time,
  waits_learning,
  // It is resident and got no row.
  stays_step,
  stays_floor,
  // It got a chunk, of this size because ...
  chunk_rest,
  chunk_limit,
  chunk_step,
  chunk_floor,
  chunk_share,
  chunk_learning,
  // It decodes, or does not.
  decodes,
  waits_own_end,
  waits_room,
  preempted,
  preempted_self,
  // Its KV comes from a peer.
  imports,
  // Its prefix comes from host memory.
  loads,
  waits_loads,
};

struct WhyWords {
  Why why;
  std::string_view name;
  std::string_view words;
};

/// In the order of the values.
inline constexpr std::array why_table{
    WhyWords{Why::none, "NONE", "nobody looked at it yet"},
    WhyWords{Why::waits_blocks, "WAITS_BLOCKS", "its blocks are not free"},
    WhyWords{Why::waits_prefix, "WAITS_PREFIX", "another sequence computes blocks of its prefix"},
    WhyWords{Why::waits_step, "WAITS_STEP", "the step's prefill tokens were used up"},
    WhyWords{Why::waits_floor, "WAITS_FLOOR", "one more user would take the running ones below the TPS floor"},
    WhyWords{Why::waits_time, "WAITS_TIME", "the running users left no time for its first chunk"},
    WhyWords{Why::waits_learning, "WAITS_LEARNING", "steps with so many users were not measured yet"},
    WhyWords{Why::stays_step, "STAYS_STEP", "no chunk: the step's prefill tokens were used up"},
    WhyWords{Why::stays_floor, "STAYS_FLOOR", "no chunk: the running users left no time for it"},
    WhyWords{Why::chunk_rest, "CHUNK_REST", "its last chunk is the rest of its prompt"},
    WhyWords{Why::chunk_limit, "CHUNK_LIMIT", "its last chunk has chunk_tokens tokens"},
    WhyWords{Why::chunk_step, "CHUNK_STEP", "its last chunk is what the step had left of step_tokens"},
    WhyWords{Why::chunk_floor, "CHUNK_FLOOR", "its last chunk is what the running users left of the step's time"},
    WhyWords{Why::chunk_share, "CHUNK_SHARE",
             "its last chunk is what prompts get though users are below the TPS floor"},
    WhyWords{Why::chunk_learning, "CHUNK_LEARNING", "its last chunk is small: larger steps were not measured yet"},
    WhyWords{Why::decodes, "DECODES", "it decodes"},
    WhyWords{Why::waits_own_end, "WAITS_OWN_END", "its last token is in flight"},
    WhyWords{Why::waits_room, "WAITS_ROOM", "it waits for a block for its next token"},
    WhyWords{Why::preempted, "PREEMPTED", "its blocks were needed by another sequence"},
    WhyWords{Why::preempted_self, "PREEMPTED_SELF", "it found no block for its next token"},
    WhyWords{Why::imports, "IMPORTS", "a peer's KV of its prompt is being read"},
    WhyWords{Why::loads, "LOADS", "it waits for its prefix to be loaded from host memory"},
    WhyWords{Why::waits_loads, "WAITS_LOADS", "its prefix is in host memory, and too many loads are in flight"},
};
static_assert([] {
  for (std::size_t i = 0; i < why_table.size(); ++i) {
    if (static_cast<std::size_t>(why_table[i].why) != i || why_table[i].words.empty()) return false;
  }
  return static_cast<std::size_t>(Why::waits_loads) + 1 == why_table.size();
}());

[[nodiscard]] constexpr std::string_view words_of(Why why) noexcept {
  return why_table[static_cast<std::size_t>(why)].words;
}

}  // namespace tokenrelay::scheduler

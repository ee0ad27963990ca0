// Which part of the pool a sequence gets, where there are several: the ranks of each hold the KV of their own
// sequences.
#include <algorithm>
#include <compare>

#include "send.hpp"

namespace tokenrelay::scheduler {

/// Blocks that a new sequence may have in a part.
int Scheduler::room_in(int part) const noexcept { return pool_.available(part) - blocks_reserved(part); }

/// In the part that has the most.
int Scheduler::room() const noexcept {
  int most = room_in(0);
  for (int part = 1; part < pool_.parts(); ++part) most = std::max(most, room_in(part));
  return most;
}

/// What the index of one part knows of the prompt; `found_` has the blocks.
Scheduler::Match Scheduler::match_in(int part, Sequence& sequence) noexcept {
  Match match;
  match.part = part;
  // The last token is computed anew, as one is sampled from it; but where a peer did that.
  const int computed = sequence.handover == Handover::destination ? 0 : 1;
  const int reusable = (sequence.text.size() - computed) / config_.block_tokens;
  PrefixWalk walk(pool_, part);
  for (int i = 0; i < reusable; ++i) {
    const auto at = static_cast<std::size_t>(i);
    const BlockPool::Found found = walk.next(sequence.text.hash(at));
    if (found.id == no_block) break;
    found_[at] = found.id;
    if (!found.sealed) {
      match.promised = found.id;
      ++match.promised_blocks;
    } else if (match.promised == no_block) {
      ++match.blocks;
      match.unpinned += !found.pinned;
    }
  }
  return match;
}

/// The part where the sequence fits and the sum of what is active then, of what becomes active, and of what must be
/// computed is least; where it fits in none, the least of all. So a turn goes back to where its text is, unless those
/// ranks are so busy that computing it anew elsewhere is soon made up for; and what shares only a short prefix spreads.
Scheduler::Match Scheduler::match(Sequence& sequence) noexcept {
  if (pool_.parts() == 1) return match_in(0, sequence);
  const int blocks = (sequence.text.size() + config_.block_tokens - 1) / config_.block_tokens;
  struct Price {
    bool too_much;
    int cost;
    int free;  // less is more: of parts that cost the same the one where the least cache is evicted
    auto operator<=>(const Price&) const = default;
  };
  Match best;
  Price best_price{};
  for (int part = 0; part < pool_.parts(); ++part) {
    const Match found = match_in(part, sequence);
    const int fresh = blocks - found.blocks;
    const int active = pool_.part_blocks() - pool_.available(part);
    const bool fits = fresh + found.unpinned + growth_of(sequence) <= room_in(part);
    const Price price{!fits, active + found.unpinned + fresh + (fresh - found.promised_blocks), -pool_.free(part)};
    if (part == 0 || price < best_price) {
      best = found;
      best_price = price;
    }
  }
  return best.part == pool_.parts() - 1 ? best : match_in(best.part, sequence);
}

}  // namespace tokenrelay::scheduler

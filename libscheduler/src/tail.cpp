// A prompt that ends, or parts from another one, inside of a block that is cached: the tokens they have in common are
// copied into a block of its own (copy on write) and not computed. Its first step copies; the source is pinned until
// that step was committed.
#include <algorithm>

#include "send.hpp"

namespace tokenrelay::scheduler {

/// Looks for a block whose beginning comes next, behind those that `match` found. `spare`: blocks that are available
/// beyond what the admission takes: a source that nobody reads is no longer available once it is pinned.
void Scheduler::match_tail(Sequence& sequence, Match& match, int spare) noexcept {
  if (match.promised != no_block) return;
  const int first = match.blocks * config_.block_tokens;
  // The last token is computed anew, as one is sampled from it.
  const int wanted = std::min(config_.block_tokens, sequence.text.size() - 1 - first);
  if (wanted < config_.tail_tokens_min) return;
  const auto at = static_cast<std::size_t>(match.blocks);
  const BlockId parent = at == 0 ? no_block : found_[at - 1];
  const Hash128 hash = at == 0 ? sequence.text.root() : sequence.text.hash(at - 1);
  const auto tokens = sequence.text.tokens().subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(wanted));
  const BlockPool::Tail tail = pool_.find_tail(parent, hash, tokens);
  if (tail.tokens < config_.tail_tokens_min || (!tail.pinned && spare < 1)) return;
  match.tail = tail;
}

/// Pins what was found.
void Scheduler::settle_tail(Sequence& sequence, const Match& match, request::Residence& home) noexcept {
  sequence.tail = match.tail.id;
  sequence.tail_tokens = match.tail.tokens;
  if (sequence.tail != no_block) home.tail = pool_.pin(sequence.tail);
}

/// Its first row was planned: that step copies, and pins the source until its commit.
void Scheduler::launch_tail(Sequence& sequence, Plan& out, Flight& flight) noexcept {
  const std::int32_t* row =
      &block_table_[static_cast<std::size_t>(sequence.slot) * static_cast<std::size_t>(table_width_)];
  out.tail_sources.push_back(sequence.tail);
  out.tail_blocks.push_back(row[flight.rows.back().start / config_.block_tokens]);
  out.tail_tokens.push_back(sequence.tail_tokens);
  totals_.tail_tokens += static_cast<std::uint64_t>(sequence.tail_tokens);
  sequence.tail_tokens = 0;
  flight.rows.back().tail = true;
  ++tails_;
}

/// What the last block of a sequence that is over holds, if others may copy it: its last token was never computed.
std::optional<Content> Scheduler::rest_of(Sequence& sequence) const noexcept {
  const int computed = sequence.text.size() - 1;
  const int tokens = computed % config_.block_tokens;
  if (config_.tail_tokens_min == 0 || tokens < config_.tail_tokens_min) return std::nullopt;
  return sequence.text.rest(static_cast<std::size_t>(computed));
}

/// Before that row lands, which gives the source back: it was read as a prompt's beginning is.
void Scheduler::land_tail(const Row& row) noexcept {
  --tails_;
  pool_.releasing({at(row.index).origin, SIZE_MAX});
}

}  // namespace tokenrelay::scheduler

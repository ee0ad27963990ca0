// The host tier as the scheduler sees it: prompts whose prefix continues in host memory, and the ends of copies.
#include <algorithm>

#include "send.hpp"

namespace tokenrelay::scheduler {

/// Blocks of its prompt behind those that `match` found that are to be loaded; -1: too many loads are in flight.
int Scheduler::loadable(Sequence& sequence, const Match& match) const noexcept {
  if (!tier_.on() || !sequence.loads || sequence.handover == Handover::destination) return 0;
  const int reusable = (sequence.text.size() - 1) / config_.block_tokens;  // the last token is computed anew
  int blocks = match.blocks;
  while (blocks < reusable && tier_.holds(sequence.text.hash(static_cast<std::size_t>(blocks)))) ++blocks;
  const int wanted = blocks - match.blocks;
  if (wanted <= tier_.loads_free()) return wanted;
  // Loads that are late may never end: one goes on with what there is room for.
  return tier_.loads_timely() > 0 ? -1 : tier_.loads_free();
}

/// Room for all of its prompt is there: `loads` blocks are loaded behind the cached ones.
void Scheduler::reside_load(SequenceIndex index, const Match& match, int blocks, int loads,
                            std::int64_t now_us) noexcept {
  Sequence& sequence = at(index);
  request::Residence home = settle_in(index, match, blocks, std::max(launched_max(), static_cast<std::size_t>(loads)));
  home.chain.launch(pool_.records(), sequence.planned, loads * config_.block_tokens, config_.block_tokens);
  copy::Batch batch(static_cast<std::size_t>(loads));
  const auto targets = home.chain.in_flight().numbers();
  for (std::size_t i = 0; i < targets.size(); ++i) {
    const Hash128& hash = sequence.text.hash(static_cast<std::size_t>(match.blocks) + i);
    batch.push_back(tier_.load(hash, targets[i], index, now_us));
  }
  charge(index, sequence.text.size() - (match.blocks + loads) * config_.block_tokens);
  sequence.loading = loads;
  sequence.arrived = true;
  sequence.why = Why::loads;
  ++tier_prompts_;
  send(sequence, request::Load{resources_, std::move(home), std::move(batch)});
}

bool Scheduler::copy_ended(std::uint64_t id, bool well) noexcept {
  const HostTier::Ended ended = tier_.end(id, well);
  if (!ended.known) return false;
  stuck_ = {};  // blocks and loads are available again
  if (ended.reader != no_sequence) load_ended(ended.reader);
  return true;
}

std::size_t Scheduler::copied(std::span<const std::uint64_t> ids) noexcept {
  const auto known = std::count_if(ids.begin(), ids.end(), [this](std::uint64_t id) { return copy_ended(id, true); });
  wake();
  return static_cast<std::size_t>(known);
}

std::size_t Scheduler::copy_failed(std::span<const std::uint64_t> ids) noexcept {
  const auto known = std::count_if(ids.begin(), ids.end(), [this](std::uint64_t id) { return copy_ended(id, false); });
  wake();
  return static_cast<std::size_t>(known);
}

/// One more load of a sequence has ended: its blocks become readable in their order, and at the last one it goes on.
void Scheduler::load_ended(SequenceIndex index) noexcept {
  Sequence& sequence = at(index);
  --sequence.loading;
  const auto* state = std::get_if<request::Loading>(&sequence.state);
  TR_ASSERT(state != nullptr, "a load ended for a sequence that waits for none");
  while (!state->batch.empty() && tier_.landed(state->batch.front())) {
    send(sequence, request::Arrive{resources_, sequence.text, sequence.planned});
    sequence.planned += config_.block_tokens;
    tier_tokens_ += static_cast<std::uint64_t>(config_.block_tokens);
    state = std::get_if<request::Loading>(&sequence.state);
  }
  if (sequence.loading > 0) return;
  // What failed it computes: then its tenant is charged for it too.
  waiting_.served(index, static_cast<double>(state->batch.copies().size()) * config_.block_tokens, false);
  send(sequence, request::Loaded{resources_});
  totals_.hashed_blocks += sequence.text.take_hashed();
  sequence.reused = sequence.planned;
  first_admitted(sequence);
  prefilling_tokens_ += sequence.text.size();
  sequence.why = Why::none;
  seal_exports(sequence);
}

/// A sequence that loads its prefix waits again; `event` says why.
template <class Event>
void Scheduler::unload(SequenceIndex index, Event&& event) noexcept {
  Sequence& sequence = at(index);
  pool_.releasing({sequence.origin, static_cast<std::size_t>(sequence.output_start / config_.block_tokens)});
  expect_service(index);
  send(sequence, std::forward<Event>(event));
  vacate(sequence);
  sequence.planned = sequence.loading = 0;
  sequence.arrived = false;
}

void Scheduler::preempt_load(SequenceIndex index) noexcept { unload(index, request::Preempt{resources_}); }

/// Copies whose deadline passed are reported. Who waits for one waits no longer, and computes its prompt itself.
void Scheduler::expire_copies(std::int64_t now_us) noexcept {
  tier_.expire(now_us, [this](SequenceIndex index) {
    at(index).loads = false;
    unload(index, request::Expire{resources_});
  });
}

std::optional<std::string> Scheduler::check_batch(SequenceIndex index, const request::Loading& state) const {
  const auto copies = state.batch.copies();
  const auto targets = state.home.chain.in_flight().numbers();
  if (copies.size() != targets.size()) return "it has other loads than blocks that are loaded";
  for (std::size_t i = 0; i < copies.size(); ++i) {
    if (!tier_.serves(copies[i], index, targets[i])) return "a load writes another block than its sequence thinks";
  }
  return std::nullopt;
}

}  // namespace tokenrelay::scheduler

// KV that passes between workers. The source: handles, whose pins follow the blocks of their sequences. The
// destination: sequences whose blocks a transfer writes.
#include <algorithm>

#include "send.hpp"

namespace tokenrelay::scheduler {

/// The handle of a source gets pins on what was sealed since the last call.
void Scheduler::seal_exports(const Sequence& sequence) {
  if (sequence.handover != Handover::source || !exports_.contains(sequence.id)) return;
  std::visit(
      [&]<class S>(const S& state) {
        if constexpr (requires { state.home.chain; }) {
          const auto sealed = state.home.chain.sealed().numbers();
          const std::size_t known = exports_.pins(sequence.id).size();
          if (sealed.size() <= known) return;
          handle::Stake fresh(sealed.size() - known);
          for (const BlockId id : sealed.subspan(known)) fresh.add(pool_.pin(id));
          exports_.seal(sequence.id, std::move(fresh), pool_);
        }
      },
      sequence.state);
}

/// After its first token: the partial last block becomes readable too, and the sequence is over.
void Scheduler::hand_over(Sequence& sequence) {
  handle::Stake rest(1);
  send(sequence, request::HandOver{resources_, rest});
  exports_.seal(sequence.id, std::move(rest), pool_);
}

std::optional<std::string_view> Scheduler::handle(std::uint64_t sequence_id, HandleEvent event) noexcept {
  return exports_.apply(sequence_id, event, pool_);
}

std::vector<BlockId> Scheduler::readable(std::uint64_t sequence_id, std::size_t first) const {
  std::vector<BlockId> ids;
  if (!exports_.contains(sequence_id)) return ids;
  const auto pins = exports_.pins(sequence_id);
  for (std::size_t at = first; at < pins.size(); ++at) ids.push_back(read(pins[at]));
  return ids;
}

/// A slot and blocks for all of its prompt are there: a transfer writes those that the cache lacks.
void Scheduler::reside_import(SequenceIndex index, const Match& match, int blocks) noexcept {
  Sequence& sequence = at(index);
  request::Residence home = settle_in(index, match, blocks, static_cast<std::size_t>(blocks));
  sequence.cached_tokens = sequence.planned;
  sequence.charged = true;
  home.chain.launch(pool_.records(), sequence.planned, sequence.text.size() - sequence.planned, config_.block_tokens);
  home.flights.launch();
  ++sequence.flights;
  ++importing_;
  sequence.importing = true;
  sequence.why = Why::imports;
  reserved_.push_back({sequence.id, sequence.planned});
  send(sequence, request::Import{resources_, std::move(home)});
}

std::vector<Reserved> Scheduler::take_reserved() { return std::exchange(reserved_, {}); }

std::vector<BlockId> Scheduler::import_blocks(std::uint64_t sequence_id) const {
  const SequenceIndex index = ids_.find(sequence_id);
  if (index == IdMap::none) return {};
  const auto* state = std::get_if<request::Importing>(&at(index).state);
  if (state == nullptr) return {};
  const auto ids = state->home.chain.in_flight().numbers();
  return {ids.begin(), ids.end()};
}

/// No transfer writes its blocks any more.
void Scheduler::import_over(Sequence& sequence) noexcept {
  --sequence.flights;
  --importing_;
  sequence.importing = false;
}

ImportAnswer Scheduler::imported(std::uint64_t sequence_id, TokenId token) noexcept {
  const SequenceIndex index = ids_.find(sequence_id);
  if (index == IdMap::none) return ImportAnswer::unknown;
  Sequence& sequence = at(index);
  if (!sequence.importing) return ImportAnswer::not_importing;
  if (std::holds_alternative<request::Aborting>(sequence.state)) return import_stopped(sequence_id, std::nullopt);
  if (sequence.text.size() + 1 >= sequence.length_limit) return ImportAnswer::nothing_left;
  const int start = sequence.planned;
  const int length = sequence.text.size() - start;
  import_over(sequence);
  send(sequence, request::Imported{resources_, sequence.text, start, length});
  totals_.hashed_blocks += sequence.text.take_hashed();
  sequence.planned = start + length;
  continue_from(sequence, token);
  sequence.arrived = true;
  wake();
  return ImportAnswer::done;
}

ImportAnswer Scheduler::import_stopped(std::uint64_t sequence_id, std::optional<TokenId> token) noexcept {
  const SequenceIndex index = ids_.find(sequence_id);
  if (index == IdMap::none) return ImportAnswer::unknown;
  Sequence& sequence = at(index);
  const int start = sequence.planned;
  const int length = sequence.text.size() - start;
  const bool waits = sequence.handover == Handover::destination && sequence.slot < 0;
  if (!sequence.importing && !waits) return ImportAnswer::not_importing;
  if (token && sequence.text.size() + 1 >= sequence.length_limit) return ImportAnswer::nothing_left;
  if (std::holds_alternative<request::Aborting>(sequence.state)) {
    import_over(sequence);
    send(sequence, request::Land{resources_, sequence.text, start, length});
    sequence.importing = true;  // for `settle`: no commit gives these blocks back
    settle(index);
    wake();
    return ImportAnswer::done;
  }
  if (sequence.importing) {
    import_over(sequence);
    expect_service(index);
    send(sequence, request::Renounce{resources_, start, length});
    vacate(sequence);
    sequence.planned = 0;
    sequence.cached_tokens = -1;
    sequence.charged = false;
  }
  sequence.matched = -1;
  if (token) {
    continue_from(sequence, *token);
  } else {
    sequence.handover = Handover::none;
  }
  wake();
  return ImportAnswer::done;
}

/// Its first token was sampled by a peer, and is known to whoever asked for it.
void Scheduler::continue_from(Sequence& sequence, TokenId token) noexcept {
  sequence.handover = Handover::none;
  sequence.text.append(token);
  sequence.length_planned = sequence.text.size();
  sequence.emitted = true;
}

}  // namespace tokenrelay::scheduler

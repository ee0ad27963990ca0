// Drafts: which of them a step computes, and what is kept of them at its commit (drafts.hpp).
#include <algorithm>

#include "send.hpp"

namespace tokenrelay::scheduler {

DraftAnswer Scheduler::draft(std::uint64_t sequence_id, std::span<const TokenId> token_ids) noexcept {
  if (config_.draft_tokens == 0) return DraftAnswer::off;
  const SequenceIndex index = ids_.find(sequence_id);
  if (index == IdMap::none) return DraftAnswer::unknown;
  Sequence& sequence = at(index);
  // Asked before the draft is leased: a rejected event would have to give it back.
  const bool decodes = std::holds_alternative<request::Decoding>(sequence.state);
  if (!decodes || sequence.handover == Handover::source) return DraftAnswer::not_decoding;
  if (token_ids.empty() || sequence.length_limit - sequence.length_planned <= 1) return DraftAnswer::nothing_left;
  send(sequence, request::Propose{drafts_.lease(token_ids)});
  return DraftAnswer::drafted;
}

/// Tokens of drafts that the step being planned may have beside a row for each user: of its tokens, and of the time
/// that the TPS floor leaves.
int Scheduler::draft_room() const noexcept {
  const int rows = decoding_.size();
  const int most = std::min(config_.step_tokens - rows, drafts_.leased() * config_.draft_tokens);
  return floor_.draft_tokens(model_, rows, most);
}

/// How many tokens of a sequence's draft its next row computes. Without one, or without room for it: none, and the
/// sequence decodes as if nobody had drafted.
int Scheduler::draft_width(SequenceIndex index) noexcept {
  Sequence& sequence = at(index);
  const auto* state = std::get_if<request::Drafted>(&sequence.state);
  if (state == nullptr) return 0;
  const int left = sequence.length_limit - sequence.text.size() - 1;  // no token is sampled past the length limit
  const int known = static_cast<int>(drafts_.tokens(state->draft).size());
  const int width = std::min({known, config_.draft_tokens, left, draft_room_});
  if (width <= 0) send(sequence, request::Drop{resources_});
  return std::max(0, width);
}

/// A block for the drafted tokens that do not fit behind the known one, if there is one more than all that decode may
/// need in this step: nobody is preempted for a guess. How many tokens have a place; with none the draft is dropped.
int Scheduler::reserve_drafted(Sequence& sequence, int width, std::optional<WritableBlock>& room) noexcept {
  const int position = sequence.planned;
  const int fits = config_.block_tokens - position % config_.block_tokens - 1;
  if (width <= fits) return width;
  TR_ASSERT(!room, "a draft is no longer than a block");
  std::int32_t* row = &block_table_[static_cast<std::size_t>(sequence.slot) * static_cast<std::size_t>(table_width_)];
  const int at_block = position / config_.block_tokens;
  if (pool_.available(sequence.part) > decoding_.size()) room = pool_.take(row[at_block]);
  if (room) {
    row[at_block + 1] = table_entry(*room);
    return width;
  }
  if (fits == 0) send(sequence, request::Drop{resources_});
  return fits;
}

/// A step that was launched before the draft came sampled a token: the draft begins with it, or was wrong.
void Scheduler::follow(Sequence& sequence, TokenId token) noexcept {
  const auto tokens = drafts_.tokens(std::get<request::Drafted>(sequence.state).draft);
  if (tokens.size() > 1 && tokens.front() == token) {
    send(sequence, request::Confirm{resources_});
  } else {
    send(sequence, request::Drop{resources_});
  }
}

/// A step computed a draft: its tokens are kept as long as each is what was sampled before it, up to a stop token. The
/// last token kept is one that was sampled, so a draft that is wrong from the beginning still gives one.
void Scheduler::commit_draft(const Row& row, std::span<const TokenId> sampled, std::int32_t first, std::int64_t now_us,
                             Outcome& out) noexcept {
  Sequence& sequence = at(row.index);
  const auto& stops = sequence.stop_token_ids;
  int kept = 0;
  if (const auto* state = std::get_if<request::Verifying>(&sequence.state)) {
    const auto draft = drafts_.tokens(state->draft);
    const auto goes_on = [&](TokenId token, TokenId guess) {
      return token == guess && !std::binary_search(stops.begin(), stops.end(), token);
    };
    while (kept + 1 < row.length &&
           goes_on(sampled[static_cast<std::size_t>(kept)], draft[static_cast<std::size_t>(kept)]))
      ++kept;
    ++kept;
  } else if (std::holds_alternative<request::Preempting>(sequence.state)) {
    kept = 1;  // its draft is gone
  }
  for (int i = 0; i + 1 < kept; ++i) sequence.text.append(sampled[static_cast<std::size_t>(i)]);
  send(sequence, request::Verify{resources_, sequence.text, row.start, row.length, kept});
  totals_.hashed_blocks += sequence.text.take_hashed();
  if (kept == 0) return;  // it is over
  ++totals_.drafts.drafts;
  totals_.drafts.tokens += static_cast<std::uint64_t>(row.length - 1);
  totals_.drafts.accepted += static_cast<std::uint64_t>(kept - 1);
  sequence.drafted += row.length - 1;
  sequence.accepted += kept - 1;
  sequence.planned = row.start + kept;
  sequence.length_planned += kept - 1;
  for (int i = 0; i + 1 < kept; ++i) {
    give(row.index, sampled[static_cast<std::size_t>(i)], first + i, Finish::none, 0, now_us, out);
    floor_.gained(sequence.due_us, sequence.tps_floor);
  }
  take_token(row.index, sampled[static_cast<std::size_t>(kept - 1)], first + kept - 1, now_us, out);
}

/// A sequence that decodes has no block beyond its tokens but for a draft that a launched step computes.
std::optional<std::string> Scheduler::check_draft(SequenceIndex index) const {
  const Sequence& s = at(index);
  return std::visit(
      [&]<class S>(const S& state) -> std::optional<std::string> {
        if constexpr (std::is_same_v<S, request::Decoding> || std::is_same_v<S, request::Drafted> ||
                      std::is_same_v<S, request::Verifying>) {
          const int blocks = (s.planned + config_.block_tokens - 1) / config_.block_tokens;
          if (static_cast<int>(state.home.chain.size()) != blocks) return "it holds blocks that it has no tokens for";
        }
        if constexpr (std::is_same_v<S, request::Verifying>) {
          if (s.flights != 1) return "other steps hold it than the one that computes its draft";
          if (s.planned <= s.text.size()) return "its draft has no tokens";
        }
        return std::nullopt;
      },
      s.state);
}

}  // namespace tokenrelay::scheduler

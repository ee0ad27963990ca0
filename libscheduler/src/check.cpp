// The integrity check: what the types cannot say. For tests and idle time; it looks at everything.
#include <algorithm>

#include "send.hpp"

namespace tokenrelay::scheduler {
namespace {

using block::Kind;

/// What the sequences hold of each block, counted anew.
struct Holdings {
  std::vector<int> owners;
  std::vector<int> pins;
  explicit Holdings(int blocks) : owners(static_cast<std::size_t>(blocks)), pins(static_cast<std::size_t>(blocks)) {}

  std::optional<std::string> own(std::span<const BlockId> ids, Kind kind, const block::Records& records) {
    for (const BlockId id : ids) {
      const auto at = static_cast<std::size_t>(id);
      if (++owners[at] > 1) return "block " + std::to_string(id) + " has two owners";
      if (records[at].kind != kind) return "block " + std::to_string(id) + " is in another state than its owner thinks";
    }
    return std::nullopt;
  }
  std::optional<std::string> pin(std::span<const BlockId> ids, const block::Records& records) {
    for (const BlockId id : ids) {
      ++pins[static_cast<std::size_t>(id)];
      if (records[static_cast<std::size_t>(id)].kind != Kind::sealed) {
        return "block " + std::to_string(id) + " is pinned and not sealed";
      }
    }
    return std::nullopt;
  }
};

std::optional<std::string> hold(Holdings& holdings, const BlockChain& chain, const block::Records& records) {
  if (auto broken = holdings.pin(chain.sealed().numbers(), records)) return broken;
  if (auto broken = holdings.own(chain.in_flight().numbers(), Kind::in_flight, records)) return broken;
  return holdings.own(chain.writable().numbers(), Kind::writable, records);
}

/// The block whose beginning a residence, or what is left of it, copies.
std::optional<std::string> hold(Holdings& holdings, const std::optional<SealedPin>& tail,
                                const block::Records& records) {
  if (!tail) return std::nullopt;
  const BlockId id = read(*tail);
  return holdings.pin({&id, 1}, records);
}

std::optional<std::string> hold(Holdings& holdings, const Remains& remains, const block::Records& records) {
  if (auto broken = holdings.pin(remains.pins().numbers(), records)) return broken;
  return holdings.own(remains.quarantined().numbers(), Kind::quarantined, records);
}

/// The chain in the order of the sequence's tokens.
std::vector<BlockId> in_order(const BlockChain& chain) {
  std::vector<BlockId> ids;
  for (const auto part : {chain.sealed().numbers(), chain.in_flight().numbers()}) {
    ids.insert(ids.end(), part.begin(), part.end());
  }
  const auto writable = chain.writable().numbers();
  ids.insert(ids.end(), writable.rbegin(), writable.rend());
  return ids;
}

}  // namespace

std::optional<std::string> Scheduler::check_table(const Sequence& s, const BlockChain& chain) const {
  const std::int32_t* row = &block_table_[static_cast<std::size_t>(s.slot) * static_cast<std::size_t>(table_width_)];
  const std::vector<BlockId> ids = in_order(chain);
  if (!std::equal(ids.begin(), ids.end(), row)) return "the block table's row differs from the sequence's blocks";
  if (std::any_of(ids.begin(), ids.end(), [&](BlockId id) { return pool_.part_of(id) != s.part; }))
    return "it has a block of another part of the pool";
  if (static_cast<std::int64_t>(ids.size()) * config_.block_tokens < s.planned)
    return "tokens are planned that have no block";
  return std::nullopt;
}

std::optional<std::string> Scheduler::check() const {
  if (auto broken = pool_.check()) return broken;
  if (auto broken = waiting_.check()) return broken;
  if (auto broken = tier_.check()) return broken;
  Holdings holdings(pool_.blocks());
  int resident = 0;
  int waiting = 0;
  int settling = 0;
  int importing = 0;
  int drafts = 0;
  std::vector<int> growth(growth_.size());
  std::int64_t prefilling = 0;
  std::vector<int> flights(sequences_.size());
  int tails = 0;
  for (std::size_t i = 0; i < flights_size_; ++i) {
    for (const Row& row : flights_[(flights_first_ + i) % flights_.size()].rows) {
      ++flights[static_cast<std::size_t>(row.index)];
      tails += row.tail;
    }
  }
  for (std::size_t i = 0; i < sequences_.size(); ++i) {
    const Sequence& s = sequences_[i];
    importing += s.importing;
    growth[static_cast<std::size_t>(s.part)] += s.growth;
    if (s.growth < 0 || (s.growth > 0 && s.slot < 0)) return "blocks are kept for a sequence that is not resident";
    const auto broken = std::visit(
        [&]<class S>(const S& state) -> std::optional<std::string> {
          if constexpr (requires { state.home; }) {
            ++resident;
            settling += std::is_same_v<S, request::Preempting>;
            if (std::is_same_v<S, request::Prefilling>) prefilling += s.text.size();
            if (state.home.slot.slot() != s.slot) return "the slot's mirror is wrong";
            flights[i] += s.importing;
            if (s.importing != std::is_same_v<S, request::Importing>) return "a transfer writes it in another state";
            if (state.home.flights.count() != flights[i] || s.flights != flights[i])
              return "launched steps are miscounted";
            if (!std::is_same_v<S, request::Preempting>) {
              if (auto wrong = check_table(s, state.home.chain)) return wrong;
            }
            if (auto wrong = check_draft(static_cast<SequenceIndex>(i))) return wrong;
            if (auto wrong = hold(holdings, state.home.tail, pool_.records())) return wrong;
            if constexpr (requires { state.draft; }) ++drafts;
            if constexpr (std::is_same_v<S, request::Loading>) {
              if (auto wrong = check_batch(static_cast<SequenceIndex>(i), state)) return wrong;
            }
            return hold(holdings, state.home.chain, pool_.records());
          } else if constexpr (requires { state.estate; }) {
            ++resident;
            settling += !s.importing;
            flights[i] += s.importing;
            if (state.estate.flights.count() != flights[i] || flights[i] == 0) return "it is over and was not settled";
            if (auto wrong = hold(holdings, state.estate.tail, pool_.records())) return wrong;
            return hold(holdings, state.estate.remains, pool_.records());
          } else {
            waiting += !std::is_same_v<S, request::Ended>;
            if (s.importing) return "a transfer writes a sequence that is not resident";
            if (flights[i] != 0) return "a launched step holds a sequence that is not resident";
            return std::nullopt;
          }
        },
        s.state);
    if (broken) return "sequence " + std::to_string(s.id) + ": " + *broken;
  }
  exports_.for_each_pin([&](BlockId id) { ++holdings.pins[static_cast<std::size_t>(id)]; });
  tier_.for_each_block([&](BlockId id) { ++holdings.pins[static_cast<std::size_t>(id)]; },
                       [&](BlockId id) { ++holdings.owners[static_cast<std::size_t>(id)]; });
  for (BlockId id = 0; id < pool_.blocks(); ++id) {
    const auto at = static_cast<std::size_t>(id);
    const block::Record& record = pool_.records()[at];
    const std::string which = "block " + std::to_string(id);
    if (record.pins != holdings.pins[at]) return which + " has other pins than readers";
    const bool owned =
        record.kind == Kind::writable || record.kind == Kind::in_flight || record.kind == Kind::quarantined;
    if (owned != (holdings.owners[at] == 1)) return which + " leaked, or is owned though it should not be";
  }
  const Counts now = counts();
  if (now.sequences_running != resident) return "slots leaked";
  if (now.sequences_waiting != waiting) return "the waiting queue's count is wrong";
  if (importing_ != importing) return "the count of importing sequences is wrong";
  if (growth_ != growth) return "the count of blocks that outputs are expected to take is wrong";
  if (floor_.census().size() != resident) return "the count of floors is wrong";
  if (prefilling_tokens_ != prefilling) return "the count of prompt tokens in prefill is wrong";
  if (drafts_.leased() != drafts) return "the count of drafts is wrong";
  if (tails_ != tails) return "the count of rows that copy is wrong";
  if (settling_ != settling) return "the count of settling sequences is wrong";
  if (vacant_.size() + static_cast<std::size_t>(resident + waiting) != sequences_.size()) return "sequences leaked";
  return std::nullopt;
}

}  // namespace tokenrelay::scheduler

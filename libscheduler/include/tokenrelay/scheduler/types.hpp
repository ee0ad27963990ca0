// What goes into the scheduler and what comes out: its configuration, a step's plan, a commit's outcome, counters.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "tokenrelay/scheduler/siphash.hpp"
#include "tokenrelay/scheduler/why.hpp"

namespace tokenrelay::scheduler {

/// Which cached block goes when room is needed (evictor.hpp).
enum class Eviction : std::uint8_t {
  lru,    // the one that was used least recently
  reuse,  // the one that is least likely to come back soon, by what was learned of its kind
};

/// Every field has a bound that `Config::check` names.
struct Config {
  int block_tokens = 64;          // 16, 32, 64 or 128
  int blocks = 0;                 // pool size
  int parts = 1;                  // of the pool, of one size: a sequence's blocks are of one part (pool.hpp)
  int slots = 0;                  // sequences resident at once
  int context_tokens = 0;         // prompt + output of one sequence
  int step_tokens = 2048;         // of one step, all rows together; a decode row takes one, so it is at least `slots`
  int chunk_tokens = 512;         // prefill tokens of one sequence in one step
  int waiting_max = 1024;         // queue bound
  int steps_in_flight = 2;        // launched and not yet committed; 1: no planning ahead
  int overtakes_max = 16;         // requests of its class that may be admitted before a blocked one
  int class_overtakes_max = 256;  // admissions that a class, or a tenant in its class, waits for before it goes first
  int preemptions_max = 3;        // times a sequence is preempted before others that were less often
  double tps_floor = 0;           // tokens a second that each running user keeps; 0: no floor
  double tps_fraction = 0.5;      // of what batch 1 runs at on this device: the floor in force is no higher
  double prefill_share = 0.125;   // of the device's time that prompts get though users are behind the floor; 0: none
  // A request that waited longer is admitted though the floor breaks; 0: never.
  std::int64_t floor_wait_us = 10'000'000;
  Eviction eviction = Eviction::reuse;
  int host_blocks = 0;                         // blocks that host memory has room for (host_tier.hpp); 0: no such tier
  int write_backs_max = 64;                    // in flight; and an eighth of `blocks` at most, or 4
  std::int64_t copy_deadline_us = 10'000'000;  // of a copy between device and host memory; then it is reported
  int draft_tokens = 0;                        // of one draft that a row computes, at most 15; 0: nobody drafts
  // Tokens that a prompt has in common with a cached block behind its full ones, at least, to be copied from there and
  // not computed; 0: nothing is copied. Not for a pool in parts.
  int tail_tokens_min = 0;
  std::array<std::uint8_t, 16> hash_key{};
  std::array<std::uint8_t, 16> model_identity{};

  /// What is wrong, naming the field, or nothing.
  [[nodiscard]] std::optional<std::string> check() const;
};

/// Values are those of the wire's RejectReason.
enum class RejectReason : std::uint8_t {
  queue_full = 1,
  prompt_too_long = 2,
  duplicate_id = 3,
  invalid = 5,
  parent_unknown = 6,  // submit it again with all its tokens
};
enum class ImportAnswer : std::uint8_t {
  done = 0,
  unknown = 1,        // no live sequence has this id
  not_importing = 2,  // no transfer writes its blocks
  nothing_left = 3,   // with this token it has all it may have: its source should not have handed it over
};
enum class DraftAnswer : std::uint8_t {
  drafted = 0,       // its next row computes it
  unknown = 1,       // no live sequence has this id
  not_decoding = 2,  // it waits, computes its prompt, is a source of a handover, is over, or has a draft already
  nothing_left = 3,  // it has no token, or the sequence's next one is its last
  off = 4,           // Config::draft_tokens is 0
};
enum class AbortAnswer : std::uint8_t { aborted = 0, unknown = 1, already_ended = 2 };
/// `handover`: its first token was not its last, and a peer goes on from its KV (Submission::handover).
enum class Finish : std::uint8_t { none = 0, stop = 1, length = 2, handover = 6 };

/// What becomes of the KV of a prompt in a worker that is not alone.
enum class Handover : std::uint8_t {
  none,
  source,       // a peer reads it: a handle of the sequence's id keeps it, and the sequence ends with its first token
  destination,  // a peer has it: room is made, a transfer writes there, and the sequence decodes from then on
};

/// What happens to the handle of a sequence, after libscheduler's table; in the order of handle::Events from Offer on.
enum class HandleEvent : std::uint8_t {
  offer,
  claim,
  transfer,
  adopt,
  decline,
  acknowledge,
  release,
  quarantine,
  expire,
  reclaim,
  fence,
  lose,
};

/// A sequence that has room now for what a transfer will write.
struct Reserved {
  std::uint64_t sequence_id;
  std::int32_t cached_tokens;  // of its prompt, found here: the transfer writes what comes behind
};

/// A request as it comes in. The spans live as long as the call.
struct Submission {
  static constexpr std::int64_t all_tokens = -1;
  std::uint64_t sequence_id = 0;
  std::span<const TokenId> token_ids;   // prompt, then output that was emitted elsewhere; behind what the parent gives
  std::optional<std::uint64_t> parent;  // the sequence whose first `parent_tokens` tokens the prompt begins with
  std::int64_t parent_tokens = all_tokens;
  int output_start = 0;         // where the prompt ends
  std::int64_t tokens_max = 0;  // output tokens at most, those in token_ids included
  std::span<const TokenId> stop_token_ids;
  int priority = 0;  // lower goes first; clamped to [-16, 15]
  std::span<const std::uint8_t> salt;
  std::span<const std::uint8_t> tenant;  // tenants of a class get equal shares; empty: the salt tells them apart
  Handover handover = Handover::none;
  bool tools = false;                // a hint: it may end with a tool call, whose results come back as its next turn
  std::int64_t expected_tokens = 0;  // a hint: output tokens it will likely have, at most `tokens_max`; 0: nobody says
  std::int64_t tps_floor = 0;        // tokens a second that its user keeps, in place of Config::tps_floor; 0: that one
};

/// One step, as a structure of arrays; see docs/contracts.md. Rows [0, decodes) decode, the others prefill. A decode
/// row that is longer than 1 has a draft: it is sampled after each of its tokens.
struct Plan {
  std::uint64_t step = 0;
  int decodes = 0;
  int sampled = 0;          // tokens: one of each row with samples == 1, and one of each drafted token
  int drafted = 0;          // drafted tokens of all rows; a decode row of length 1 + d has d
  double predicted_us = 0;  // how long it will take; 0: nothing is known
  std::vector<std::uint64_t> sequence_ids;
  std::vector<std::int32_t> slots;
  std::vector<std::int32_t> starts;
  std::vector<std::int32_t> lengths;
  std::vector<TokenId> token_ids;
  std::vector<std::uint8_t> feedback;
  std::vector<std::uint8_t> samples;
  std::vector<std::uint64_t> admitted_ids;
  std::vector<std::int32_t> admitted_slots;
  std::vector<std::int32_t> admitted_cached;
  std::vector<std::int32_t> admitted_output_start;
  // Before any row is computed: the KV of the first `tail_tokens` tokens of a block goes into another one.
  std::vector<std::int32_t> tail_sources;
  std::vector<std::int32_t> tail_blocks;
  std::vector<std::int32_t> tail_tokens;

  void reserve(const Config& config);
  void clear() noexcept;
};

/// Copies of blocks between device and host memory that are to be made, each independent of the others and of steps.
/// Whoever makes them answers each id once, when it no longer reads or writes for it (`copied`, `copy_failed`).
struct Copies {
  std::vector<std::uint64_t> store_ids;  // device -> host
  std::vector<std::int32_t> store_blocks;
  std::vector<std::int32_t> store_slots;
  std::vector<std::uint64_t> load_ids;  // host -> device; a sequence waits for it
  std::vector<std::int32_t> load_slots;
  std::vector<std::int32_t> load_blocks;

  [[nodiscard]] bool empty() const noexcept { return store_ids.empty() && load_ids.empty(); }
  void reserve(std::size_t copies_max);
  void clear() noexcept;
};

/// A copy that did not end before its deadline: what it holds stays held until it ends.
struct LateCopy {
  std::uint64_t id;
  bool load;  // else a write-back
  std::int32_t block;
  std::int32_t slot;
};

/// The new tokens of one committed step, a row for each. Those of a draft that came true follow each other; only the
/// last one of a sequence can be its end.
struct Outcome {
  std::vector<std::uint64_t> sequence_ids;
  std::vector<TokenId> token_ids;
  std::vector<std::uint8_t> finish;
  std::vector<std::int32_t> rows;  // index among the plan's sampled tokens
  std::vector<std::uint8_t> first;
  std::vector<std::int32_t> cached_tokens;

  void reserve(const Config& config);
  void clear() noexcept;
};

/// How the TPS floor fares. A user's token is late when it came more than one token's time after it was due.
struct FloorCounts {
  double tps_in_force = 0;        // 0: no floor, or batch 1 is not known yet
  double tps_batch_1 = 0;         // what one user alone would get now; 0: not known yet
  int users_below = 0;            // in the last step: users whose token was late
  std::uint64_t tokens = 0;       // that were due
  std::uint64_t tokens_late = 0;  // of those
  std::uint64_t overrides = 0;    // admissions past `floor_wait_us` that the floor would have kept back
};

/// The host tier; `blocks` of 0: there is none.
struct HostCounts {
  int blocks = 0;
  int blocks_used = 0;
  int write_backs_in_flight = 0;
  int loads_in_flight = 0;
  int copies_late = 0;              // of those in flight
  std::uint64_t blocks_stored = 0;  // written back
  std::uint64_t blocks_loaded = 0;
  std::uint64_t loads = 0;          // prompts that waited for one
  std::uint64_t tokens_loaded = 0;  // that those did not have to compute
  std::uint64_t copies_failed = 0;
  std::uint64_t copies_expired = 0;
};

/// Drafts that were computed, by steps whose commit took them.
struct DraftCounts {
  int sequences = 0;           // that have a draft now
  std::uint64_t drafts = 0;    // rows
  std::uint64_t tokens = 0;    // of those
  std::uint64_t accepted = 0;  // of those tokens, that came true and were kept
};

struct Counts {
  int blocks_free = 0;
  int blocks_cached = 0;
  int blocks_active = 0;  // of these:
  int blocks_writable = 0;
  int blocks_in_flight = 0;
  int blocks_quarantined = 0;
  int blocks_sealed = 0;
  int sequences_waiting = 0;  // held ones included
  int sequences_running = 0;  // in a slot, those that only wait for launched steps included
  int steps_in_flight = 0;
  int sequences_importing = 0;  // of those that run: a transfer may write their blocks
  int handles_open = 0;         // whose blocks a peer may read
  int sequences_loading = 0;    // of those that run: they wait for their prefix from host memory
  std::uint64_t preemptions = 0;
  std::uint64_t aborts = 0;
  std::uint64_t prompt_tokens = 0;  // of sequences admitted for the first time
  std::uint64_t cached_tokens = 0;  // of those, found in the cache
  std::uint64_t tail_tokens = 0;    // of all admissions, copied from a block whose beginning was theirs
  std::uint64_t output_tokens = 0;
  std::uint64_t hashed_blocks = 0;  // whose hash was computed, and not known from an earlier turn
  FloorCounts floor;
  HostCounts host;
  DraftCounts drafts;
};

}  // namespace tokenrelay::scheduler

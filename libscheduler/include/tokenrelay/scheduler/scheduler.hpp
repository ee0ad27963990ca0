// The scheduler: a state machine without clock, thread, socket or tensor. Facts come in, plans come out, and the same
// inputs give the same plans. Single-threaded.
//
//     Scheduler scheduler(config);
//     scheduler.submit({.sequence_id = 1, .token_ids = prompt, .output_start = n, .tokens_max = 16}, now_us);
//     while (scheduler.plan(now_us, plan)) { ...run it...; scheduler.commit(plan.step, sampled, now_us, outcome); }
//
// Cost follows the change: a step costs O(its rows), an admission O(its prompt), whatever waits or is cached.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "tokenrelay/scheduler/cost_model.hpp"
#include "tokenrelay/scheduler/explain.hpp"
#include "tokenrelay/scheduler/exports.hpp"
#include "tokenrelay/scheduler/floor.hpp"
#include "tokenrelay/scheduler/host_tier.hpp"
#include "tokenrelay/scheduler/id_map.hpp"
#include "tokenrelay/scheduler/request_table.hpp"
#include "tokenrelay/scheduler/turns.hpp"
#include "tokenrelay/scheduler/types.hpp"

namespace tokenrelay::scheduler {

class Scheduler {
 public:
  /// The configuration must pass its own check.
  explicit Scheduler(const Config& config);
  ~Scheduler();
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  // Events from outside: each is answered by a value.
  [[nodiscard]] std::optional<RejectReason> submit(const Submission& submission, std::int64_t now_us);
  AbortAnswer abort(std::uint64_t sequence_id, std::int64_t now_us) noexcept;
  /// Fills `out` with the next step, which counts as launched. False: nothing can run now.
  [[nodiscard]] bool plan(std::int64_t now_us, Plan& out) noexcept;
  /// Somebody guesses the tokens that come next, behind all that are known. As long as a sequence has a draft no step
  /// is planned ahead; its next row computes what the draft has of `Config::draft_tokens`, and its commit keeps the
  /// tokens that equal what was sampled. Tokens of launched steps are held against the draft first.
  DraftAnswer draft(std::uint64_t sequence_id, std::span<const TokenId> token_ids) noexcept;
  /// The step that `commit` expects next, and how many tokens it sampled; nothing when none is launched.
  struct Expected {
    std::uint64_t step;
    std::size_t tokens;
  };
  [[nodiscard]] std::optional<Expected> expected() const noexcept;
  static constexpr std::int64_t by_clock = -1;
  /// Takes what the oldest launched step sampled; `step` and the number of tokens must be the expected ones. `run_us`:
  /// how long the device ran it, 0 when that says nothing (it failed); `by_clock`: the time between commits.
  void commit(std::uint64_t step, std::span<const TokenId> token_ids, std::int64_t now_us, Outcome& out,
              std::int64_t run_us = by_clock) noexcept;

  // KV that passes between workers (docs/handover.md). The source:
  /// `words`: a generation for each block, where peers read it; before the first submission.
  void count_generations_in(std::span<std::uint64_t> words) noexcept { pool_.count_in(words); }
  [[nodiscard]] std::span<const std::uint64_t> generations() const noexcept { return pool_.generations(); }
  /// Moves the handle of a sequence (that may have ended). What refuses it, or nothing.
  [[nodiscard]] std::optional<std::string_view> handle(std::uint64_t sequence_id, HandleEvent event) noexcept;
  /// The state of that handle; empty when there is none.
  [[nodiscard]] std::string_view handle_state(std::uint64_t sequence_id) const noexcept {
    return exports_.state(sequence_id);
  }
  /// Its blocks from the `first` on that a peer may read, in the order of its tokens.
  /// The sealed block with this content, or no_block. Its generation says later whether it still is. O(1).
  [[nodiscard]] BlockId sealed_block(const Hash128& hash) const noexcept {
    const BlockPool::Found found = pool_.find(hash);
    return found.sealed ? found.id : no_block;
  }
  [[nodiscard]] std::vector<BlockId> readable(std::uint64_t sequence_id, std::size_t first) const;
  // The destination:
  /// Sequences that got room since the last call.
  [[nodiscard]] std::vector<Reserved> take_reserved();
  /// The blocks of such a sequence that the transfer writes, in the order of its tokens.
  [[nodiscard]] std::vector<BlockId> import_blocks(std::uint64_t sequence_id) const;
  /// The transfer has ended and what it read was validated; `token` is the first one, sampled by the peer. A sequence
  /// that was aborted meanwhile gives its blocks back.
  ImportAnswer imported(std::uint64_t sequence_id, TokenId token) noexcept;
  /// There is no transfer, or it has ended in vain: the sequence computes its prompt itself (and `token`, if one knows
  /// it). One that was aborted gives its blocks back.
  ImportAnswer import_stopped(std::uint64_t sequence_id, std::optional<TokenId> token) noexcept;

  // The host tier (host_tier.hpp); nothing of it happens when `host_blocks` is 0.
  /// What is to be copied since the last call; after each `plan`, also one that planned nothing.
  void take_copies(Copies& out) noexcept { tier_.take(out); }
  /// These copies have ended, well or in vain: nobody reads or writes for them any more. How many of the ids are of
  /// copies in flight.
  std::size_t copied(std::span<const std::uint64_t> ids) noexcept;
  std::size_t copy_failed(std::span<const std::uint64_t> ids) noexcept;
  /// When the first copy in flight will be late, which the next `plan` then finds; nothing when there is none.
  [[nodiscard]] std::optional<std::int64_t> copy_deadline_us() const noexcept { return tier_.deadline_us(); }
  /// Copies that were found late since the last call.
  [[nodiscard]] std::vector<LateCopy> take_late_copies() { return tier_.take_late(); }

  // Views.
  [[nodiscard]] const Config& config() const noexcept { return config_; }
  /// int32 [slots, table_width], written in place; rows of launched steps keep what those steps use.
  [[nodiscard]] const std::int32_t* block_table() const noexcept { return block_table_.data(); }
  [[nodiscard]] int table_width() const noexcept { return table_width_; }
  [[nodiscard]] Counts counts() const noexcept;
  /// What was learned about which blocks come back.
  [[nodiscard]] const ReuseModel& reuse() const noexcept { return pool_.reuse(); }
  /// Beside the KV, for one block of the pool, the tables that are the same for every pool included; its token ids
  /// (4 bytes a token, by which a prompt's blocks are recognised without hashing) are not.
  [[nodiscard]] double bookkeeping_bytes_per_block() const noexcept;
  /// Prompt and output known so far; nothing when the id is not live.
  [[nodiscard]] std::optional<std::span<const TokenId>> token_ids(std::uint64_t sequence_id) const noexcept;
  [[nodiscard]] std::vector<CacheEvent> take_cache_events() { return pool_.take_events(); }
  /// Every invariant that can be checked from outside the types. What is broken, or nothing. O(everything).
  [[nodiscard]] std::optional<std::string> check() const;
  /// Where a sequence stands and why, when somebody asks; nothing when the id is not live. O(sequences).
  [[nodiscard]] std::optional<Explanation> explanation(std::uint64_t sequence_id) const;
  /// The same in words, for any id.
  [[nodiscard]] std::string explain(std::uint64_t sequence_id) const;
  /// What was decided about it last; nothing when the id is not live.
  [[nodiscard]] std::optional<Why> why(std::uint64_t sequence_id) const noexcept;
  [[nodiscard]] const CostModel& cost_model() const noexcept { return model_; }

 private:
  struct Sequence {
    std::uint64_t id = 0;
    fsm::Slot<RequestFsm> state{std::in_place_type<request::Ended>};
    HashedTokens text;
    std::vector<TokenId> stop_token_ids;  // sorted
    std::int32_t output_start = 0;
    std::int32_t length_limit = 0;     // prompt + output, at most
    std::int32_t length_expected = 0;  // prompt + output, likely; 0: nobody says
    std::int32_t tps_floor = 0;        // of its own; 0: everybody's
    std::int32_t growth = 0;           // blocks kept for what its output will likely take; 0 unless resident
    std::int32_t planned = 0;          // tokens whose KV stands or is being computed by a launched step
    std::int32_t length_planned = 0;   // tokens known, plus those that launched steps will sample
    std::int32_t slot = -1;            // while resident
    std::int32_t part = 0;             // of the pool, while resident
    std::int32_t flights = 0;          // mirrors the state's Flights, to settle without looking inside
    std::int32_t cached_tokens = -1;   // at first admission
    std::int32_t overtaken = 0;        // requests of its class that went before it while it was blocked
    std::int32_t holds = 0;            // times it waited for a block of somebody else
    std::int32_t preempted = 0;        // times
    std::int32_t climbs_to = 0;        // the class it is of when it waits again
    std::int32_t reused = 0;           // tokens found in the cache at its last admission
    BlockId tail = no_block;           // its first row copies `tail_tokens` from the beginning of this block
    std::int32_t tail_tokens = 0;      // 0: it did, or there is nothing to copy
    std::int32_t blocks_wanted = 0;    // blocked until so many are available: spares looking again each step
    std::int32_t matched = -1;         // blocks found in the cache when it was looked at last; -1: it was not
    std::int64_t submitted_us = 0;
    std::int64_t due_us = not_due;    // its next decode row's token, by the TPS floor's schedule
    std::uint64_t preempted_for = 0;  // the sequence that needed its blocks the last time
    std::int32_t chunk = 0;           // its last chunk, tokens
    std::int32_t drafted = 0;         // tokens that were computed as its drafts
    std::int32_t accepted = 0;        // of those, that came true
    Why why = Why::none;
    Why preempted_why = Why::none;  // the last time
    bool emitted = false;
    Handover handover = Handover::none;
    bool importing = false;          // a transfer may write its blocks
    bool arrived = false;            // it was imported or loaded, and had no row since
    bool loads = true;               // what host memory has of its prompt; false: such a load came too late
    bool charged = false;            // its tenant, for its prompt
    std::int32_t loading = 0;        // loads of it that have not ended
    Origin origin = Origin::prompt;  // what its blocks are when it leaves them
  };
  struct Row {
    SequenceIndex index;
    std::int32_t start;
    std::int32_t length;
    bool samples;
    bool draft;         // it samples after each of its tokens
    bool tail = false;  // it copies the beginning of another block
  };
  struct Flight {  // a launched step
    std::uint64_t step = 0;
    std::size_t sampled = 0;
    std::vector<Row> rows;
    StepShape shape;
    double predicted_us = 0;
    std::int64_t planned_us = 0;
  };
  struct Match {                  // what the prefix index knows of a prompt
    int blocks = 0;               // sealed ones at its beginning
    int unpinned = 0;             // of those, cached: they would no longer be available
    BlockId promised = no_block;  // the last of the blocks after them that are being computed
    int promised_blocks = 0;      // all of those
    int part = 0;                 // of the pool
    BlockPool::Tail tail;         // behind them: a block of others, whose beginning is the prompt's too
  };
  enum class Admission : std::uint8_t { admitted, held, blocked, paced };  // paced: not now, for the floor's sake

  static constexpr double output_weight = 2;  // of a token that is decoded, in a tenant's share; one of a prompt is 1
  static constexpr int holds_max = 8;         // then a sequence computes its prefix itself
  static constexpr int lookahead = 4;         // blocked requests of a class that others may be tried behind
  static constexpr std::size_t ended_max = 4096;  // ended ids that are remembered
  static constexpr std::size_t turns_max = 1024;  // ended texts that are kept for next turns

  [[nodiscard]] Sequence& at(SequenceIndex index) noexcept { return sequences_[static_cast<std::size_t>(index)]; }
  [[nodiscard]] const Sequence& at(SequenceIndex index) const noexcept {
    return sequences_[static_cast<std::size_t>(index)];
  }
  template <class Event>
  void send(Sequence& sequence, Event&& event) noexcept;
  struct Parent {  // where a submission's beginning is
    HashedTokens* text = nullptr;
    Turns::Turn* turn = nullptr;  // it ended, and the text is its own: it can be handed on
    std::size_t length = 0;
  };
  [[nodiscard]] std::optional<Parent> find_parent(const Submission& submission) noexcept;
  [[nodiscard]] HashedTokens text_of(const Submission& submission, const Parent& parent, std::size_t limit);
  [[nodiscard]] std::optional<RejectReason> refuse(const Submission& submission, std::size_t inherited) const noexcept;
  [[nodiscard]] std::optional<std::string> check_table(const Sequence& s, const BlockChain& chain) const;
  void hash_prompt(HashedTokens& text) noexcept;
  [[nodiscard]] std::uint64_t tenant_key(const Submission& submission) const;
  [[nodiscard]] Hash128 root_of(std::span<const std::uint8_t> salt) const;

  // plan.cpp
  bool plan_step(std::int64_t now_us, Plan& out) noexcept;
  void plan_rows(std::int64_t now_us, Plan& out, Flight& flight) noexcept;
  [[nodiscard]] std::int64_t step_begins(std::int64_t now_us) const noexcept;
  void launched(std::int64_t now_us, Plan& out, Flight& flight) noexcept;
  void plan_decodes(Plan& out, Flight& flight) noexcept;
  bool plan_decode(SequenceIndex index, Plan& out, Flight& flight) noexcept;
  void decode_row(SequenceIndex index, int width, std::optional<WritableBlock> room, Plan& out,
                  Flight& flight) noexcept;
  void plan_prefills(Budget& budget, Plan& out, Flight& flight) noexcept;
  void plan_prefill(SequenceIndex index, Budget& budget, Plan& out, Flight& flight) noexcept;
  struct Chunk {
    int length;
    Why why;
  };
  [[nodiscard]] Chunk chunk_of(int start, int left, const Budget& budget) const noexcept;
  void add_row(SequenceIndex index, int length, bool feedback, bool samples, Plan& out, Flight& flight) noexcept;
  void admit_waiting(std::int64_t now_us, Budget& budget, Plan& out, Flight& flight) noexcept;
  bool admit_from(int priority_class, bool overdue, std::int64_t now_us, Budget& budget, Plan& out,
                  Flight& flight) noexcept;
  [[nodiscard]] int next_class(std::uint32_t mask, bool& overdue) const noexcept;
  Admission admit(SequenceIndex index, std::int64_t now_us, Budget& budget, Plan& out, Flight& flight) noexcept;
  [[nodiscard]] Why floor_admits(const Sequence& sequence, const Flight& flight) const noexcept;
  [[nodiscard]] bool fits(Sequence& sequence, const Budget& budget) const noexcept;
  // parts.cpp
  [[nodiscard]] Match match(Sequence& sequence) noexcept;
  [[nodiscard]] Match match_in(int part, Sequence& sequence) noexcept;
  [[nodiscard]] int room() const noexcept;
  [[nodiscard]] int room_in(int part) const noexcept;
  template <class List>
  [[nodiscard]] SequenceIndex last_of(const List& list, int part) const noexcept {
    SequenceIndex index = list.last();
    while (index != no_sequence && at(index).part != part) index = list.before(index);
    return index;
  }
  void reside(SequenceIndex index, const Match& match, int blocks, Plan& out) noexcept;
  // tail.cpp
  void match_tail(Sequence& sequence, Match& match, int available) noexcept;
  void settle_tail(Sequence& sequence, const Match& match, request::Residence& home) noexcept;
  void launch_tail(Sequence& sequence, Plan& out, Flight& flight) noexcept;
  void land_tail(const Row& row) noexcept;
  [[nodiscard]] std::optional<Content> rest_of(Sequence& sequence) const noexcept;

  [[nodiscard]] request::Residence settle_in(SequenceIndex index, const Match& match, int blocks,
                                             std::size_t launched_max) noexcept;
  void announce(Sequence& sequence, Plan& out) noexcept;

  [[nodiscard]] int growth_of(const Sequence& sequence) const noexcept;
  void expect_growth(Sequence& sequence) noexcept;
  void vacate(Sequence& sequence) noexcept;

  /// Room for running ones to grow, against thrashing: some for everybody, and what is known to be needed. When nothing
  /// runs there is none: a whole part must be had by one.
  [[nodiscard]] int blocks_reserved(int part) const noexcept {
    const int running = prefilling_.size() + decoding_.size() + loading_.size();
    const bool empty = pool_.available(part) == pool_.part_blocks();
    const int everybody = std::max(1, running / (4 * pool_.parts()));
    return running == 0 || empty ? 0 : everybody + growth_[static_cast<std::size_t>(part)];
  }

  void first_admitted(Sequence& sequence) noexcept;
  void charge(SequenceIndex index, int tokens) noexcept;
  [[nodiscard]] std::size_t launched_max() const noexcept;

  // tier.cpp
  [[nodiscard]] int loadable(Sequence& sequence, const Match& match) const noexcept;
  void reside_load(SequenceIndex index, const Match& match, int blocks, int loads, std::int64_t now_us) noexcept;
  bool copy_ended(std::uint64_t id, bool well) noexcept;
  void load_ended(SequenceIndex index) noexcept;
  template <class Event>
  void unload(SequenceIndex index, Event&& event) noexcept;
  void preempt_load(SequenceIndex index) noexcept;
  void expire_copies(std::int64_t now_us) noexcept;
  [[nodiscard]] std::optional<std::string> check_batch(SequenceIndex index, const request::Loading& state) const;

  // explain.cpp
  void explain_queue(SequenceIndex index, Explanation& out) const;
  [[nodiscard]] std::uint64_t writer_of(BlockId id) const;

  // draft.cpp
  [[nodiscard]] int draft_room() const noexcept;
  [[nodiscard]] int draft_width(SequenceIndex index) noexcept;
  [[nodiscard]] int reserve_drafted(Sequence& sequence, int width, std::optional<WritableBlock>& room) noexcept;
  void follow(Sequence& sequence, TokenId token) noexcept;
  void commit_draft(const Row& row, std::span<const TokenId> sampled, std::int32_t first, std::int64_t now_us,
                    Outcome& out) noexcept;
  [[nodiscard]] std::optional<std::string> check_draft(SequenceIndex index) const;

  // pressure.cpp
  bool make_room(SequenceIndex for_index) noexcept;
  [[nodiscard]] SequenceIndex victim(int part) const noexcept;
  [[nodiscard]] double recompute_us(SequenceIndex index) const noexcept;
  void preempt(SequenceIndex index, SequenceIndex for_index) noexcept;

  // handover.cpp
  void seal_exports(const Sequence& sequence);
  void hand_over(Sequence& sequence);
  void reside_import(SequenceIndex index, const Match& match, int blocks) noexcept;
  void import_over(Sequence& sequence) noexcept;
  static void continue_from(Sequence& sequence, TokenId token) noexcept;

  // commit.cpp
  void measure(const Flight& flight, std::int64_t now_us, std::int64_t run_us) noexcept;
  void take_token(SequenceIndex index, TokenId token, std::int32_t row, std::int64_t now_us, Outcome& out) noexcept;
  void give(SequenceIndex index, TokenId token, std::int32_t row, Finish finish, int in_flight, std::int64_t now_us,
            Outcome& out) noexcept;
  void settle(SequenceIndex index) noexcept;
  void end(SequenceIndex index) noexcept;
  bool wake() noexcept;
  void expect_service(SequenceIndex index) noexcept;

  Config config_;
  HashKey key_;
  int table_width_;
  std::vector<std::int32_t> block_table_;

  BlockPool pool_;
  SlotPool slots_;
  Links links_;
  Ranks ranks_;
  WaitingQueue waiting_;
  HoldBoard holds_;
  PrefillList prefilling_;
  DecodeList decoding_;
  LoadList loading_;
  HostTier tier_;
  DraftPool drafts_;
  Resources resources_;

  std::vector<Sequence> sequences_;       // never grows: waiting_max + slots
  std::vector<SequenceIndex> vacant_;     // places in `sequences_` that nobody has
  IdMap ids_;                             // of live sequences
  IdMap ended_;                           // of the last `ended_max` that ended
  std::vector<std::uint64_t> ended_ids_;  // a ring
  std::size_t ended_next_ = 0;
  std::size_t ended_size_ = 0;
  Turns turns_;
  Exports exports_;
  std::vector<Reserved> reserved_;  // room for every slot
  int importing_ = 0;               // sequences whose blocks a transfer may write
  std::uint64_t tier_prompts_ = 0;  // that waited for loads from host memory
  std::uint64_t tier_tokens_ = 0;   // that were loaded for them

  std::vector<Flight> flights_;  // a ring of steps_in_flight
  std::size_t flights_first_ = 0;
  std::size_t flights_size_ = 0;
  std::uint64_t steps_ = 0;
  std::uint64_t tickets_ = 0;
  std::uint64_t admissions_ = 0;
  std::array<std::uint64_t, WaitingQueue::classes> class_served_{};  // `admissions_` when a class was last served
  struct Stuck {  // the last admissions found everybody blocked: nothing to look at until one of these changes
    int available = -1;
    int running = 0;
    std::uint64_t version = 0;
  };
  Stuck stuck_;
  std::vector<int> growth_;     // by part: blocks that outputs of its sequences will likely take beyond those they have
  int settling_ = 0;            // sequences that will give blocks back at a commit
  std::vector<BlockId> found_;  // what `match` found, block by block
  bool stalled_ = false;        // a decode found no block in the step being planned
  int draft_room_ = 0;          // tokens of drafts that the step being planned has room for
  int tails_ = 0;               // rows of launched steps that pin a block whose beginning they copy

  CostModel model_;
  Floor floor_;
  std::int64_t committed_us_ = 0;       // the last commit
  std::int64_t final_tokens_ = 0;       // of those whose prompt ends with the step being planned: they decode next
  std::int64_t prefilling_tokens_ = 0;  // of the sequences that prefill: what they will decode with

  Counts totals_;
};

}  // namespace tokenrelay::scheduler

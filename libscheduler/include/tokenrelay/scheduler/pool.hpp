// The block pool: free blocks, cached blocks in the order of their eviction, and the prefix index.
//
//     std::optional<WritableBlock> block = pool.take(previous);     // evicts a cached block if none is free
//     SealedPin pin = pool.seal(std::move(writable), content);
//     pool.unpin(std::move(pin));                                  // the last reader leaves it as cache
//
// Everything is O(1) and allocates nothing after construction.
//
// A pool may be divided into parts of as many blocks each, one behind the other, where several ranks hold KV of
// different sequences: a sequence's blocks are of one part, and so is what it finds in the cache. Free blocks, the
// order of eviction and the prefix index are each part's own.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "tokenrelay/scheduler/block.hpp"
#include "tokenrelay/scheduler/evictor.hpp"
#include "tokenrelay/scheduler/host_pool.hpp"
#include "tokenrelay/scheduler/lineage.hpp"
#include "tokenrelay/scheduler/prefix_index.hpp"

namespace tokenrelay::scheduler {

/// What the fleet's directory wants to know, in the order it happened.
struct CacheEvent {
  enum class Kind : std::uint8_t { sealed, evicted, lost };
  Kind kind;
  Hash128 hash;
};

class BlockPool {
 public:
  BlockPool(int blocks, int block_tokens, Eviction eviction = Eviction::reuse, int parts = 1);
  BlockPool(const BlockPool&) = delete;
  BlockPool& operator=(const BlockPool&) = delete;

  /// A block for one owner: the one after `previous` if it is free (runs coalesce), else any free one of its part, else
  /// a cached one, by the policy. Empty when every block of the part is active. `part`: of a sequence's first block.
  [[nodiscard]] std::optional<WritableBlock> take(BlockId previous, int part = 0) noexcept;
  /// Announces what a writable block will hold, so that others wait for it. False: its part's index knows that content
  /// already.
  bool promise(const WritableBlock& block, const Content& content) noexcept;
  /// Makes a full block immutable; the caller is its first reader.
  [[nodiscard]] SealedPin seal(WritableBlock&& block, const Content& content) noexcept;
  /// The same for a block that is not full: nobody finds it, and its last reader frees it.
  [[nodiscard]] SealedPin seal_nameless(WritableBlock&& block) noexcept;
  /// The same for the end of a text that is over: it is found by who begins like it (`find_tail`), and is told to
  /// nobody else. Nothing when the pool has it already.
  [[nodiscard]] std::optional<SealedPin> seal_part(WritableBlock&& block, const Content& content) noexcept;
  /// As `seal_part`, when the last launched step that wrote the block behind those tokens was committed.
  [[nodiscard]] std::optional<SealedPin> keep_part(block::Free&& block, const Content& content) noexcept;
  void release(WritableBlock&& block) noexcept;
  /// A launched step writes the block and its owner is over: nobody shall wait for its content any more.
  [[nodiscard]] QuarantinedBlock abandon(InFlightBlock&& block) noexcept;
  void put(block::Free&& block) noexcept;

  struct Found {
    BlockId id = no_block;
    bool sealed = false;  // else: promised, somebody computes it
    bool pinned = false;
  };
  /// In any part, a sealed one if there is one.
  [[nodiscard]] Found find(const Hash128& hash) const noexcept;
  [[nodiscard]] Found find_in(int part, const Hash128& hash) const noexcept;
  /// The block after `parent` (one that was found) that holds these tokens, if it is the one that followed last.
  [[nodiscard]] BlockId find_child(BlockId parent, std::span<const TokenId> tokens) const noexcept {
    return lineage_.child(parent, at(parent).hash, tokens, records_);
  }
  /// A sealed block that begins with some of these tokens: the one that followed last after `parent` (a block that was
  /// found; no_block: after the root `hash`).
  struct Tail {
    BlockId id = no_block;
    int tokens = 0;
    bool pinned = false;
  };
  [[nodiscard]] Tail find_tail(BlockId parent, const Hash128& hash, std::span<const TokenId> tokens) const noexcept;
  /// One more reader of a sealed or cached block.
  [[nodiscard]] SealedPin pin(BlockId id) noexcept;
  /// `index`: which block of its reader's sequence it was.
  void unpin(SealedPin&& pin, std::size_t index = 0) noexcept;
  // Write-backs to host memory (host_tier.hpp).
  /// From here on sealed blocks are noted for `next_unwritten`, and evicted ones are touched in `host`.
  void mirror(HostPool& host);
  /// A block that was sealed a while ago, in that order, and that nobody copies; no_block when there is none. Who does
  /// not ask in time misses the oldest.
  [[nodiscard]] BlockId next_unwritten() noexcept;
  /// A pin that is no reader's: it changes nothing in the order of eviction, and the block's kind stays.
  [[nodiscard]] SealedPin borrow(BlockId id) noexcept;
  void give_back(SealedPin&& pin) noexcept;
  /// That pin may stay for long: nobody waits for it any more.
  void lent_for_long(const SealedPin& pin) noexcept;
  /// Blocks that only a write-back pins, and not for long: they will be available again.
  [[nodiscard]] int borrowed() const noexcept { return borrowed_; }

  /// A sequence gives its pins back, from the last one to the first.
  void releasing(const Usage& usage) noexcept {
    for (Part& part : parts_) part.evictor.releasing(usage);
  }
  /// What happens from here on happens at this time.
  void clock(std::int64_t now_us) noexcept {
    for (Part& part : parts_) part.evictor.clock(now_us);
  }

  /// Asks for the block's number in `fired` when it is sealed or given up.
  void watch(BlockId id) noexcept { records_[static_cast<std::size_t>(id)].watched = true; }
  [[nodiscard]] std::vector<BlockId>& fired() noexcept { return fired_; }

  [[nodiscard]] block::Records& records() noexcept { return records_; }
  [[nodiscard]] const block::Records& records() const noexcept { return records_; }
  /// How often each block was taken, so that a peer's read can be validated after it was made (law 4): a block that was
  /// taken since it was named has another generation. Bumped before the block's new owner can write. `words` lives as
  /// long as the pool, may be shared memory, and has one for each block; before any block is taken.
  void count_in(std::span<std::uint64_t> words) noexcept { generations_ = words; }
  [[nodiscard]] std::span<const std::uint64_t> generations() const noexcept { return generations_; }
  [[nodiscard]] int blocks() const noexcept { return static_cast<int>(records_.size()); }
  [[nodiscard]] int parts() const noexcept { return parts_size_; }
  [[nodiscard]] int part_blocks() const noexcept { return part_blocks_; }
  [[nodiscard]] int part_of(BlockId id) const noexcept { return parts_size_ == 1 ? 0 : id / part_blocks_; }
  [[nodiscard]] int free() const noexcept {
    int free = 0;
    for (const Part& part : parts_) free += part.free.size;
    return free;
  }
  [[nodiscard]] int cached() const noexcept {
    int cached = 0;
    for (const Part& part : parts_) cached += part.evictor.size();
    return cached;
  }
  [[nodiscard]] int available() const noexcept { return free() + cached(); }
  [[nodiscard]] int free(int part) const noexcept { return in(part).free.size; }
  [[nodiscard]] int available(int part) const noexcept { return in(part).free.size + in(part).evictor.size(); }

  /// The events since the last call. When nobody called for too long the oldest are dropped, and the first one says so.
  [[nodiscard]] std::vector<CacheEvent> take_events();
  /// Of the first part; each learns from its own blocks.
  [[nodiscard]] const ReuseModel& reuse() const noexcept { return parts_.front().evictor.model(); }
  /// What the pool keeps beside the KV, `token_ids` apart: the tokens of each block.
  struct Bytes {
    std::size_t bookkeeping = 0;
    std::size_t token_ids = 0;
  };
  [[nodiscard]] Bytes bytes() const noexcept;
  /// What is wrong with the pool's own books, or nothing. O(pool).
  [[nodiscard]] std::optional<std::string> check() const;

 private:
  friend class PrefixWalk;
  struct Part {
    Part(int blocks, Eviction eviction)
        : index(static_cast<std::size_t>(blocks)), evictor(eviction, static_cast<std::size_t>(blocks)) {}
    PrefixIndex index;
    BlockList free;
    Evictor evictor;
  };
  Part& in(int part) noexcept { return parts_[static_cast<std::size_t>(part)]; }
  [[nodiscard]] const Part& in(int part) const noexcept { return parts_[static_cast<std::size_t>(part)]; }
  Part& home(BlockId id) noexcept { return in(part_of(id)); }
  [[nodiscard]] const Part& home(BlockId id) const noexcept { return in(part_of(id)); }
  [[nodiscard]] Found found(BlockId id) const noexcept {
    const block::Kind kind = at(id).kind;
    return {id, kind == block::Kind::sealed || kind == block::Kind::cached, kind == block::Kind::sealed};
  }
  /// Whether another part than that of `id` has a sealed block of this content.
  [[nodiscard]] bool elsewhere(BlockId id, const Hash128& hash) const noexcept;
  BlockId evict(int part) noexcept;
  void index(BlockId id, const Content& content) noexcept;
  void forget(block::Record& record, BlockId id) noexcept;
  void fire(block::Record& record, BlockId id) noexcept;
  void emit(CacheEvent::Kind kind, const Hash128& hash) noexcept;
  void unwritten(BlockId id) noexcept;
  [[nodiscard]] static std::optional<std::string> check_free(const Part& part, const block::Records& records);
  block::Record& at(BlockId id) noexcept { return records_[static_cast<std::size_t>(id)]; }
  const block::Record& at(BlockId id) const noexcept { return records_[static_cast<std::size_t>(id)]; }

  block::Records records_;
  std::vector<std::uint64_t> own_generations_;
  std::span<std::uint64_t> generations_;
  int parts_size_;
  int part_blocks_;
  std::vector<Part> parts_;
  Lineage lineage_;
  std::vector<BlockId> fired_;      // room for every block
  std::vector<CacheEvent> events_;  // a ring of fixed size
  std::size_t events_first_ = 0;
  std::size_t events_size_ = 0;
  bool events_lost_ = false;
  HostPool* host_ = nullptr;
  std::vector<BlockId> unwritten_;  // a ring: sealed blocks, room for every block
  std::size_t unwritten_first_ = 0;
  std::size_t unwritten_size_ = 0;
  int borrowed_ = 0;
};

/// Finds a prompt's blocks in one part, one after the other: each as the one that followed the last one most recently,
/// else through the index. Their records lie anywhere in memory: those that will be read soon are fetched already.
class PrefixWalk {
 public:
  PrefixWalk(const BlockPool& pool, int part) noexcept : pool_(pool), part_(part) {}
  /// The block with this hash, or none.
  [[nodiscard]] BlockPool::Found next(const Hash128& hash) noexcept {
    const BlockId guess = last_ == no_block ? no_block : pool_.lineage_.next(last_);
    const bool right = guess != no_block && pool_.at(guess).indexed && pool_.at(guess).hash == hash;
    const BlockPool::Found found = right ? pool_.found(guess) : pool_.find_in(part_, hash);
    last_ = found.id;
    if (right) {
      fetch();
    } else {
      ahead_ = last_;
      for (int i = 0; i < ahead_max; ++i) fetch();
    }
    return found;
  }

 private:
  static constexpr int ahead_max = 12;  // records under way at once, as many as a core's caches wait for

  void fetch() noexcept {
    if (ahead_ == no_block) return;
    ahead_ = pool_.lineage_.next(ahead_);
    if (ahead_ != no_block) __builtin_prefetch(&pool_.at(ahead_), 1);
  }

  const BlockPool& pool_;
  int part_;
  BlockId last_ = no_block;
  BlockId ahead_ = no_block;
};

// Here, because a next turn pins the thousand blocks of its past one by one.
inline SealedPin BlockPool::pin(BlockId id) noexcept {
  using block::Access;
  block::Record& record = at(id);
  Evictor::shared(record);
  if (record.borrowed == block::Borrowed::yes && record.pins == 1) {
    --borrowed_;
    home(id).evictor.found(record);
  }
  if (record.kind == block::Kind::cached) {
    home(id).evictor.taken(id, records_);
    Access::dissolve(on(Access::make<block::Cached>(id), block::Pin{records_}));
  } else {
    Access::dissolve(on(Access::make<block::Sealed>(id), block::Pin{records_}));
  }
  return Access::make<SealedPin>(id);
}

}  // namespace tokenrelay::scheduler

#include "tokenrelay/scheduler/pool.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <utility>

namespace tokenrelay::scheduler {

using block::Access;
using block::Kind;
using block::Record;

namespace {

// A block is written back when a sixteenth of the pool's size was sealed after it: one that the evictor has dropped by
// then was not worth it, and what the device will keep for long is copied later (bench/host_tier.py).
constexpr std::size_t write_back_lag = 16;

}  // namespace

BlockPool::BlockPool(int blocks, int block_tokens, Eviction eviction, int parts)
    : records_(static_cast<std::size_t>(blocks)),
      own_generations_(static_cast<std::size_t>(blocks)),
      generations_(own_generations_),
      parts_size_(parts),
      part_blocks_(blocks / parts),
      lineage_(static_cast<std::size_t>(blocks), static_cast<std::size_t>(block_tokens)),
      events_(std::min(2 * static_cast<std::size_t>(blocks) + 64, static_cast<std::size_t>(blocks) / 4 + 1024)) {
  TR_ASSERT(blocks % parts == 0, "the parts of a pool are of one size");
  fired_.reserve(static_cast<std::size_t>(blocks));
  parts_.reserve(static_cast<std::size_t>(parts));
  for (int part = 0; part < parts; ++part) parts_.emplace_back(part_blocks_, eviction);
  for (BlockId id = 0; id < blocks; ++id) home(id).free.push_back(id, records_);
}

std::optional<WritableBlock> BlockPool::take(BlockId previous, int part) noexcept {
  if (previous != no_block) part = part_of(previous);
  BlockId id = previous + 1;
  if (previous == no_block || id >= (part + 1) * part_blocks_ || at(id).kind != Kind::free) id = in(part).free.head;
  if (id != no_block) {
    in(part).free.unlink(id, records_);
  } else {
    id = evict(part);
    if (id == no_block) return std::nullopt;
  }
  // Sequentially consistent: the write that follows may not be seen before the new generation is.
  std::atomic_ref(generations_[static_cast<std::size_t>(id)]).fetch_add(1);
  return on(Access::make<block::Free>(id), block::Take{records_});
}

BlockId BlockPool::evict(int part) noexcept {
  const BlockId id = in(part).evictor.evict(records_);
  if (id == no_block) return no_block;
  const bool full = at(id).part == 0;
  forget(at(id), id);
  if (full && !elsewhere(id, at(id).hash)) emit(CacheEvent::Kind::evicted, at(id).hash);
  if (full && host_ != nullptr) host_->touch(at(id).hash);
  return Access::dissolve(on(Access::make<block::Cached>(id), block::Evict{records_}));
}

bool BlockPool::promise(const WritableBlock& block, const Content& content) noexcept {
  const BlockId id = Access::number(block);
  if (home(id).index.find(content.hash, records_) != no_block) return false;
  lineage_.remember(id, content);
  index(id, content);
  return true;
}

void BlockPool::index(BlockId id, const Content& content) noexcept {
  at(id).hash = content.hash;
  at(id).indexed = true;
  Part& part = home(id);
  part.index.insert(content.hash, id);
  const BlockId parent = part.index.find(content.parent, records_);
  if (parent != no_block) {
    lineage_.follow(parent, id);
  } else {
    lineage_.begin(id);
  }
  part.evictor.indexed(id, parent, records_);
}

SealedPin BlockPool::seal(WritableBlock&& block, const Content& content) noexcept {
  const BlockId id = Access::number(block);
  Record& record = at(id);
  if (record.indexed) {
    TR_ASSERT(record.hash == content.hash, "a block holds other tokens than it promised");
  } else {
    lineage_.remember(id, content);
    record.hash = content.hash;
    if (home(id).index.find(content.hash, records_) == no_block) index(id, content);
  }
  if (record.indexed) {
    if (!elsewhere(id, content.hash)) emit(CacheEvent::Kind::sealed, content.hash);
    unwritten(id);
  }
  Access::dissolve(on(std::move(block), block::Seal{records_}));  // the pool holds the state from here on
  fire(record, id);
  return Access::make<SealedPin>(id);
}

SealedPin BlockPool::seal_nameless(WritableBlock&& block) noexcept {
  const BlockId id = Access::number(block);
  TR_ASSERT(!at(id).indexed, "a block that promised its content is not sealed without it");
  at(id).nameless = true;
  Access::dissolve(on(std::move(block), block::Seal{records_}));
  return Access::make<SealedPin>(id);
}

std::optional<SealedPin> BlockPool::seal_part(WritableBlock&& block, const Content& content) noexcept {
  const BlockId id = Access::number(block);
  TR_ASSERT(!at(id).indexed, "a block that promised a full block's content is no end of a text");
  if (home(id).index.find(content.hash, records_) != no_block) {
    release(std::move(block));
    return std::nullopt;
  }
  lineage_.remember(id, content);
  index(id, content);
  at(id).part = static_cast<std::uint8_t>(content.tokens.size());
  Access::dissolve(on(std::move(block), block::Seal{records_}));
  return Access::make<SealedPin>(id);
}

std::optional<SealedPin> BlockPool::keep_part(block::Free&& block, const Content& content) noexcept {
  const BlockId id = Access::number(block);
  std::atomic_ref(generations_[static_cast<std::size_t>(id)]).fetch_add(1);  // as every block that is taken
  return seal_part(on(std::move(block), block::Take{records_}), content);
}

void BlockPool::release(WritableBlock&& block) noexcept {
  const BlockId id = Access::number(block);
  forget(at(id), id);
  fire(at(id), id);
  put(on(std::move(block), block::Release{records_}));
}

QuarantinedBlock BlockPool::abandon(InFlightBlock&& block) noexcept {
  const BlockId id = Access::number(block);
  forget(at(id), id);
  fire(at(id), id);
  return on(std::move(block), block::Abandon{records_});
}

void BlockPool::put(block::Free&& block) noexcept {
  const BlockId id = Access::dissolve(std::move(block));
  home(id).free.push_back(id, records_);
}

BlockPool::Found BlockPool::find_in(int part, const Hash128& hash) const noexcept {
  const BlockId id = in(part).index.find(hash, records_);
  return id == no_block ? Found{} : found(id);
}

BlockPool::Found BlockPool::find(const Hash128& hash) const noexcept {
  Found best = find_in(0, hash);
  for (int part = 1; part < parts() && !best.sealed; ++part) {
    const Found other = find_in(part, hash);
    if (other.sealed || best.id == no_block) best = other;
  }
  return best;
}

bool BlockPool::elsewhere(BlockId id, const Hash128& hash) const noexcept {
  for (int part = 0; part < parts(); ++part) {
    if (part != part_of(id) && find_in(part, hash).sealed) return true;
  }
  return false;
}

BlockPool::Tail BlockPool::find_tail(BlockId parent, const Hash128& hash,
                                     std::span<const TokenId> tokens) const noexcept {
  const Lineage::Alike alike = lineage_.alike(parent, hash, tokens, records_);
  if (alike.id == no_block || !at(alike.id).indexed) return {};
  const Kind kind = at(alike.id).kind;
  if (kind != Kind::sealed && kind != Kind::cached) return {};
  return {alike.id, static_cast<int>(alike.tokens), kind == Kind::sealed};
}

void BlockPool::unpin(SealedPin&& pin, std::size_t index) noexcept {
  const BlockId id = Access::dissolve(std::move(pin));
  Record& record = at(id);
  if (record.pins > 1) {
    if (record.borrowed != block::Borrowed::no && record.pins == 2) {
      home(id).evictor.left(id, index, records_);
      borrowed_ += record.borrowed == block::Borrowed::yes;
    }
    Access::dissolve(on(Access::make<block::Sealed>(id), block::Unpin{records_}));
    return;
  }
  Part& part = home(id);
  if (!record.indexed && !record.nameless && part.index.find(record.hash, records_) == no_block) {
    // The block that had this content first is gone: this one takes its place.
    record.indexed = true;
    part.index.insert(record.hash, id);
    part.evictor.indexed(id, part.index.find(lineage_.parent(id), records_), records_);
    if (!elsewhere(id, record.hash)) emit(CacheEvent::Kind::sealed, record.hash);
    unwritten(id);
  }
  if (record.indexed) {
    Access::dissolve(on(Access::make<block::Sealed>(id), block::UnpinLast{records_}));
    part.evictor.cached(id, index, records_);
  } else {
    record.nameless = false;
    put(on(Access::make<block::Sealed>(id), block::Discard{records_}));
  }
}

void BlockPool::mirror(HostPool& host) {
  host_ = &host;
  unwritten_.resize(records_.size());
}

void BlockPool::unwritten(BlockId id) noexcept {
  if (host_ == nullptr) return;
  if (unwritten_size_ == unwritten_.size()) {
    unwritten_first_ = (unwritten_first_ + 1) % unwritten_.size();
    --unwritten_size_;
  }
  unwritten_[(unwritten_first_ + unwritten_size_++) % unwritten_.size()] = id;
}

BlockId BlockPool::next_unwritten() noexcept {
  while (unwritten_size_ > unwritten_.size() / write_back_lag) {
    const BlockId id = unwritten_[unwritten_first_];
    unwritten_first_ = (unwritten_first_ + 1) % unwritten_.size();
    --unwritten_size_;
    const Record& record = at(id);  // it may be another one by now: then that one is the newer
    const bool full = record.kind == Kind::sealed || record.kind == Kind::cached;
    if (full && record.indexed && record.borrowed == block::Borrowed::no) return id;
  }
  return no_block;
}

SealedPin BlockPool::borrow(BlockId id) noexcept {
  at(id).borrowed = block::Borrowed::yes;
  if (at(id).kind == Kind::cached) {
    home(id).evictor.lifted(id, records_);
    ++borrowed_;
    Access::dissolve(on(Access::make<block::Cached>(id), block::Pin{records_}));
  } else {
    Access::dissolve(on(Access::make<block::Sealed>(id), block::Pin{records_}));
  }
  return Access::make<SealedPin>(id);
}

void BlockPool::give_back(SealedPin&& pin) noexcept {
  const BlockId id = Access::dissolve(std::move(pin));
  const bool yes = std::exchange(at(id).borrowed, block::Borrowed::no) == block::Borrowed::yes;
  if (at(id).pins > 1) {
    Access::dissolve(on(Access::make<block::Sealed>(id), block::Unpin{records_}));
    return;
  }
  borrowed_ -= yes;
  Access::dissolve(on(Access::make<block::Sealed>(id), block::UnpinLast{records_}));
  home(id).evictor.restored(id, records_);
}

void BlockPool::lent_for_long(const SealedPin& pin) noexcept {
  Record& record = at(read(pin));
  borrowed_ -= record.pins == 1;
  record.borrowed = block::Borrowed::for_long;
}

void BlockPool::forget(Record& record, BlockId id) noexcept {
  if (!record.indexed) return;
  home(id).index.erase(record.hash, id);
  record.indexed = false;
  record.part = 0;
  home(id).evictor.forgotten(id, lineage_.parent(id), records_);
}

void BlockPool::fire(Record& record, BlockId id) noexcept {
  if (!record.watched) return;
  record.watched = false;
  fired_.push_back(id);
}

void BlockPool::emit(CacheEvent::Kind kind, const Hash128& hash) noexcept {
  const std::size_t capacity = events_.size();
  if (events_size_ == capacity) {
    events_first_ = (events_first_ + 1) % capacity;
    --events_size_;
    events_lost_ = true;
  }
  events_[(events_first_ + events_size_++) % capacity] = {kind, hash};
}

std::vector<CacheEvent> BlockPool::take_events() {
  std::vector<CacheEvent> out;
  out.reserve(events_size_ + 1);
  if (events_lost_) out.push_back({CacheEvent::Kind::lost, {}});
  for (std::size_t i = 0; i < events_size_; ++i) out.push_back(events_[(events_first_ + i) % events_.size()]);
  events_first_ = events_size_ = 0;
  events_lost_ = false;
  return out;
}

std::optional<std::string> BlockPool::check_free(const Part& part, const block::Records& records) {
  int walked = 0;
  for (BlockId id = part.free.head; id != no_block; id = records[static_cast<std::size_t>(id)].next) {
    if (records[static_cast<std::size_t>(id)].kind != Kind::free)
      return "block " + std::to_string(id) + " is in the list of another state";
    if (++walked > part.free.size) break;
  }
  if (walked != part.free.size) return "a list of blocks has another length than its count";
  return std::nullopt;
}

BlockPool::Bytes BlockPool::bytes() const noexcept {
  std::size_t parts = parts_.capacity() * sizeof(Part);
  for (const Part& part : parts_) parts += part.index.bytes() + part.evictor.bytes();
  return {sizeof(*this) + records_.capacity() * sizeof(Record) + parts + lineage_.bytes() +
              (fired_.capacity() + unwritten_.capacity()) * sizeof(BlockId) +
              own_generations_.capacity() * sizeof(std::uint64_t) + events_.capacity() * sizeof(CacheEvent),
          lineage_.token_bytes()};
}

std::optional<std::string> BlockPool::check() const {
  for (const Part& part : parts_) {
    if (auto broken = check_free(part, records_)) return broken;
    if (auto broken = part.evictor.check(records_)) return broken;
  }
  int free = 0;
  int cached = 0;
  int borrowed = 0;
  std::array<int, 6> kinds{};
  for (BlockId id = 0; id < blocks(); ++id) {
    const Record& record = at(id);
    ++kinds[static_cast<std::size_t>(record.kind)];
    const std::string which = "block " + std::to_string(id);
    if (record.parent != no_block && part_of(record.parent) != part_of(id))
      return which + " follows one of another part";
    free += record.kind == Kind::free;
    cached += record.kind == Kind::cached;
    if ((record.pins > 0) != (record.kind == Kind::sealed)) return which + " has pins that do not fit its state";
    const bool launched = record.kind == Kind::in_flight || record.kind == Kind::quarantined;
    if ((record.writers > 0) != launched) return which + " has writers that do not fit its state";
    if (record.indexed && home(id).index.find(record.hash, records_) != id) return which + " is not found by its hash";
    if (record.kind == Kind::cached && !record.indexed) return which + " is cached and cannot be found";
    const bool nobody = record.kind == Kind::free || record.kind == Kind::quarantined;
    if (record.nameless && record.kind != Kind::sealed) return which + " is nameless and not sealed";
    if (record.part > 0 && !record.indexed) return which + " is the end of a text and cannot be found";
    if (record.indexed && nobody) return which + " can be found though it holds nothing";
    borrowed += record.borrowed == block::Borrowed::yes && record.pins == 1;
    if (record.borrowed != block::Borrowed::no && record.kind != Kind::sealed) return which + " is borrowed, unpinned";
  }
  if (free != this->free() || cached != this->cached()) return "the counts of free and cached blocks are wrong";
  for (std::size_t kind = 0; kind < kinds.size(); ++kind) {
    const int counted = records_.count(static_cast<Kind>(kind));
    if (block::Records::counts(static_cast<Kind>(kind)) && kinds[kind] != counted)
      return "the count of blocks in a state is wrong";
  }
  if (borrowed != borrowed_) return "the count of blocks that only write-backs pin is wrong";
  return std::nullopt;
}

}  // namespace tokenrelay::scheduler

#include "tokenrelay/scheduler/evictor.hpp"

#include <algorithm>

namespace tokenrelay::scheduler {
namespace {

block::Record& at(block::Records& records, BlockId id) noexcept { return records[static_cast<std::size_t>(id)]; }
const block::Record& at(const block::Records& records, BlockId id) noexcept {
  return records[static_cast<std::size_t>(id)];
}

}  // namespace

void BlockList::insert_after(BlockId before, BlockId id, block::Records& records) noexcept {
  const BlockId after = before == no_block ? head : at(records, before).next;
  at(records, id).previous = before;
  at(records, id).next = after;
  (before == no_block ? head : at(records, before).next) = id;
  (after == no_block ? tail : at(records, after).previous) = id;
  ++size;
}

void Evictor::indexed(BlockId id, BlockId parent, block::Records& records) noexcept {
  if (policy_ == Eviction::lru) return;
  block::Record& record = at(records, id);
  record.parent = parent;
  record.children = 0;
  record.uses = 0;
  if (ghosts_.sampled(record.hash)) {
    if (const auto ghost = ghosts_.take(record.hash)) {
      model_.reused(ghost->kind, now_us_ - ghost->used_us);
      record.uses = static_cast<std::uint8_t>(std::min<int>(ghost->uses + 1, uses_max));
    }
  }
  if (parent == no_block) return;
  block::Record& above = at(records, parent);
  ++above.children;
  if (above.kind == block::Kind::cached && !above.covered) {
    lists_[above.reuse_kind].unlink(parent, records);
    above.covered = true;
    covered_.push_back(parent, records);
  }
}

void Evictor::forgotten(BlockId id, const Hash128& parent_hash, block::Records& records) noexcept {
  if (policy_ == Eviction::lru) return;
  block::Record& record = at(records, id);
  const BlockId parent = record.parent;
  record.parent = no_block;
  record.children = 0;  // whose parent this was: they find that it is gone
  if (parent == no_block) return;
  block::Record& above = at(records, parent);
  if (!above.indexed || !(above.hash == parent_hash) || above.children == 0) return;
  if (--above.children == 0 && above.kind == block::Kind::cached) uncover(parent, records);
}

/// Its last child is gone. Its place is among those of its kind that were left at about the same time.
void Evictor::uncover(BlockId id, block::Records& records) noexcept {
  block::Record& record = at(records, id);
  covered_.unlink(id, records);
  record.covered = false;
  BlockList& list = lists_[record.reuse_kind];
  if (list.size == 0 || at(records, list.tail).used_us <= record.used_us) {
    list.push_back(id, records);
    return;
  }
  BlockId before = no_block;
  BlockId next = list.head;
  for (int walked = 0; walked < walk_max && at(records, next).used_us < record.used_us; ++walked) {
    before = next;
    next = at(records, next).next;
  }
  list.insert_after(before, id, records);
}

void Evictor::left(BlockId id, std::size_t index, block::Records& records) noexcept {
  block::Record& record = at(records, id);
  record.used_us = now_us_;
  if (policy_ == Eviction::lru) return;
  uses_ = record.uses = std::max(record.uses, uses_);
  const bool sampled = index >= usage_.prompt_blocks && usage_.origin != Origin::tool_turn;
  record.reuse_kind = reuse_kind(sampled ? Origin::output : usage_.origin, record.uses);
  if (ghosts_.sampled(record.hash)) model_.idle(record.reuse_kind);
}

/// Its place is behind those that were left before; at the end, mostly.
void Evictor::restored(BlockId id, block::Records& records) noexcept {
  block::Record& record = at(records, id);
  ++size_;
  record.covered = policy_ == Eviction::reuse && record.children > 0;
  BlockList& list = list_of(record);
  BlockId before = list.tail;
  for (int walked = 0; before != no_block && walked < walk_max; ++walked) {
    if (at(records, before).used_us <= record.used_us) break;
    before = at(records, before).previous;
  }
  list.insert_after(before, id, records);
}

void Evictor::lifted(BlockId id, block::Records& records) noexcept {
  block::Record& record = at(records, id);
  --size_;
  list_of(record).unlink(id, records);
  record.covered = false;
}

BlockId Evictor::choose(const block::Records& records) const noexcept {
  BlockId best = no_block;
  double lowest = 0;
  for (const BlockList& list : lists_) {
    if (list.head == no_block) continue;
    const block::Record& record = at(records, list.head);
    const double rate = model_.rate(record.reuse_kind, now_us_ - record.used_us);
    if (best != no_block && (rate > lowest || (rate == lowest && at(records, best).used_us <= record.used_us)))
      continue;
    best = list.head;
    lowest = rate;
  }
  return best == no_block ? covered_.head : best;  // covered by blocks that are active, all of them
}

BlockId Evictor::evict(block::Records& records) noexcept {
  const BlockId id = policy_ == Eviction::lru ? lists_[0].head : choose(records);
  if (id == no_block) return no_block;
  block::Record& record = at(records, id);
  --size_;
  list_of(record).unlink(id, records);
  record.covered = false;
  if (policy_ == Eviction::reuse && ghosts_.sampled(record.hash)) {
    gone(ghosts_.add(record.hash, {record.used_us, record.uses, record.reuse_kind}));
  }
  return id;
}

void Evictor::gone(const std::optional<Ghosts::Ghost>& ghost) noexcept {
  if (ghost) model_.gone(ghost->kind, now_us_ - ghost->used_us);
}

std::optional<std::string> Evictor::check(const block::Records& records) const {
  int walked = 0;
  const auto walk = [&](const BlockList& list, bool covered) -> std::optional<std::string> {
    int size = 0;
    for (BlockId id = list.head; id != no_block && size <= list.size; id = at(records, id).next, ++size) {
      const block::Record& record = at(records, id);
      const std::string which = "block " + std::to_string(id);
      if (record.kind != block::Kind::cached) return which + " is in the list of another state";
      if (record.covered != covered) return which + " is covered, or is not, unlike its list";
      if (covered != (record.children > 0) && policy_ == Eviction::reuse)
        return which + " has children that do not fit";
    }
    if (size != list.size) return "a list of blocks has another length than its count";
    walked += size;
    return std::nullopt;
  };
  for (const BlockList& list : lists_) {
    if (auto broken = walk(list, false)) return broken;
  }
  if (auto broken = walk(covered_, true)) return broken;
  if (walked != size_) return "the count of cached blocks is wrong";
  return std::nullopt;
}

}  // namespace tokenrelay::scheduler

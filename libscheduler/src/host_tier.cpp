#include "tokenrelay/scheduler/host_tier.hpp"

#include <algorithm>
#include <utility>

namespace tokenrelay::scheduler {

HostTier::HostTier(BlockPool& pool, const Config& config, std::size_t loads_max)
    : pool_(pool),
      host_(config.host_blocks),
      deadline_after_us_(config.copy_deadline_us),
      stores_max_(std::min(config.write_backs_max, std::max(write_backs_least, config.blocks / pool_share))),
      loads_max_(static_cast<int>(loads_max)),
      copies_(on() ? static_cast<std::size_t>(stores_max_) + loads_max : 0) {
  if (!on()) return;
  for (auto index = static_cast<CopyIndex>(copies_.size()); index-- > 0;) vacant_.push_back(index);
  issued_.reserve(copies_.size());
  late_copies_.reserve(copies_.size());
  pool_.mirror(host_);
}

template <class Event>
void HostTier::send(CopyIndex index, Event&& event) noexcept {
  const auto rejected = fsm::dispatch<CopyFsm>(at(index).state, std::forward<Event>(event));
  TR_ASSERT(!rejected, "the host tier sent an event that the copy's state rejects");
}

CopyIndex HostTier::begin(BlockId block, HostSlotId slot, SequenceIndex reader, bool load,
                          std::int64_t now_us) noexcept {
  TR_ASSERT(!vacant_.empty(), "more copies in flight than there is room for");
  const CopyIndex index = vacant_.back();
  vacant_.pop_back();
  Copy& copy = at(index);
  copy.id = ++serial_ * copies_.size() + static_cast<std::uint64_t>(index);
  copy.deadline_us = now_us + deadline_after_us_;
  copy.block = block;
  copy.slot = slot;
  copy.reader = reader;
  copy.load = load;
  copy.previous = last_;
  copy.next = none;
  (last_ == none ? first_ : at(last_).next) = index;
  last_ = index;
  return index;
}

void HostTier::unlink(CopyIndex index) noexcept {
  const Copy& copy = at(index);
  (copy.previous == none ? first_ : at(copy.previous).next) = copy.next;
  (copy.next == none ? last_ : at(copy.next).previous) = copy.previous;
}

/// The copy is over, for everybody.
void HostTier::vacate(CopyIndex index) noexcept {
  --(at(index).load ? loads_ : stores_);
  vacant_.push_back(index);
}

void HostTier::write_back(std::int64_t now_us) noexcept {
  for (int begun = 0; begun < write_backs_a_step && stores_ < stores_max_;) {
    const BlockId id = pool_.next_unwritten();
    if (id == no_block) return;
    const Hash128 hash = pool_.records()[static_cast<std::size_t>(id)].hash;
    if (host_.find(hash).id != no_host_slot) {
      host_.touch(hash);
      continue;
    }
    std::optional<host::Filling> slot = host_.take(hash);
    if (!slot) return;  // loads read all of them: the block is not written
    const CopyIndex index = begin(id, host::Access::number(*slot), no_sequence, false, now_us);
    const Copy& copy = at(index);
    issued_.store_ids.push_back(copy.id);
    issued_.store_blocks.push_back(id);
    issued_.store_slots.push_back(copy.slot);
    send(index, copy::Store{pool_.borrow(id), std::move(*slot)});
    ++stores_;
    ++begun;
  }
}

CopyIndex HostTier::load(const Hash128& hash, BlockId block, SequenceIndex reader, std::int64_t now_us) noexcept {
  const HostPool::Found found = host_.find(hash);
  TR_ASSERT(found.readable && loads_free() > 0, "a block is loaded that cannot be");
  const CopyIndex index = begin(block, found.id, reader, true, now_us);
  issued_.load_ids.push_back(at(index).id);
  issued_.load_slots.push_back(found.id);
  issued_.load_blocks.push_back(block);
  send(index, copy::Load{host_.lend(found.id)});
  ++loads_;
  return index;
}

void HostTier::collect(CopyIndex index) noexcept {
  send(index, copy::Collect{});
  vacate(index);
}

void HostTier::orphan(CopyIndex index, QuarantinedBlock&& target) noexcept {
  Copy& copy = at(index);
  copy.reader = no_sequence;
  if (std::holds_alternative<copy::Loading>(copy.state)) {
    send(index, copy::Orphan{std::move(target)});
    ++orphans_;
    return;
  }
  copy::free_target(std::move(target), pool_);
  collect(index);
}

HostTier::Ended HostTier::end(std::uint64_t id, bool well) noexcept {
  if (copies_.empty()) return {};
  const auto index = static_cast<CopyIndex>(id % copies_.size());
  Copy& copy = at(index);
  if (copy.id != id) return {};
  const bool is_late =
      std::holds_alternative<copy::StoringLate>(copy.state) || std::holds_alternative<copy::OrphanedLate>(copy.state);
  const bool orphaned = std::holds_alternative<copy::Orphaned>(copy.state);
  const auto rejected = well ? fsm::dispatch<CopyFsm>(copy.state, copy::Done{pool_, host_})
                             : fsm::dispatch<CopyFsm>(copy.state, copy::Fail{pool_, host_});
  if (rejected) return {};
  if (!is_late) unlink(index);
  orphans_ -= orphaned ? 1 : 0;
  loads_late_ -= is_late && copy.load ? 1 : 0;
  totals_.copies_failed += well ? 0 : 1;
  if (copy.load) {
    totals_.blocks_loaded += well ? 1 : 0;
  } else {
    totals_.blocks_stored += well && !is_late ? 1 : 0;
  }
  if (std::holds_alternative<copy::Vacant>(copy.state)) vacate(index);
  return {true, copy.reader};
}

/// Reported, once; what it holds it keeps.
void HostTier::late(CopyIndex index) noexcept {
  Copy& copy = at(index);
  unlink(index);
  orphans_ -= std::holds_alternative<copy::Orphaned>(copy.state) ? 1 : 0;
  loads_late_ += copy.load ? 1 : 0;
  send(index, copy::Expire{pool_});
  ++totals_.copies_expired;
  if (late_copies_.size() < late_copies_.capacity()) {  // else nobody asks
    late_copies_.push_back({copy.id, copy.load, copy.block, copy.slot});
  }
}

void HostTier::take(Copies& out) noexcept {
  out.clear();
  std::swap(out, issued_);
  if (issued_.store_ids.capacity() < copies_.size()) issued_.reserve(copies_.size());
}

std::vector<LateCopy> HostTier::take_late() {
  std::vector<LateCopy> out(late_copies_.begin(), late_copies_.end());
  late_copies_.clear();
  return out;
}

void HostTier::stop() noexcept {
  for (const Copy& copy : copies_) end(copy.id, false);
  issued_.clear();
}

HostCounts HostTier::counts() const noexcept {
  HostCounts counts = totals_;
  counts.blocks = host_.slots();
  counts.blocks_used = host_.used();
  counts.write_backs_in_flight = stores_;
  counts.loads_in_flight = loads_;
  counts.copies_late = static_cast<int>(std::count_if(copies_.begin(), copies_.end(), [](const Copy& copy) {
    return std::holds_alternative<copy::StoringLate>(copy.state) ||
           std::holds_alternative<copy::OrphanedLate>(copy.state);
  }));
  return counts;
}

bool HostTier::serves(CopyIndex index, SequenceIndex sequence, BlockId block) const noexcept {
  const Copy& copy = at(index);
  const bool waited_for = std::holds_alternative<copy::Loading>(copy.state) ||
                          std::holds_alternative<copy::Landed>(copy.state) ||
                          std::holds_alternative<copy::Failed>(copy.state);
  return waited_for && copy.load && copy.reader == sequence && copy.block == block;
}

std::optional<std::string> HostTier::check_counts() const {
  int stores = 0;
  int loads = 0;
  int orphans = 0;
  int late = 0;
  int vacant = 0;
  int flying = 0;
  for (const Copy& copy : copies_) {
    vacant += std::holds_alternative<copy::Vacant>(copy.state);
    if (std::holds_alternative<copy::Vacant>(copy.state)) continue;
    stores += !copy.load;
    loads += copy.load;
    orphans += std::holds_alternative<copy::Orphaned>(copy.state);
    late += std::holds_alternative<copy::OrphanedLate>(copy.state);
    flying += std::holds_alternative<copy::Storing>(copy.state) || std::holds_alternative<copy::Loading>(copy.state) ||
              std::holds_alternative<copy::Orphaned>(copy.state);
  }
  int walked = 0;
  std::int64_t deadline = 0;
  for (CopyIndex index = first_; index != none && walked <= flying; index = at(index).next, ++walked) {
    if (walked > 0 && at(index).deadline_us < deadline) return "copies are not in the order of their deadlines";
    deadline = at(index).deadline_us;
  }
  if (walked != flying) return "a copy in flight has no deadline";
  if (stores != stores_ || loads != loads_ || orphans != orphans_ || late != loads_late_) {
    return "the counts of copies in flight are wrong";
  }
  if (vacant != static_cast<int>(vacant_.size())) return "copies leaked";
  return std::nullopt;
}

std::optional<std::string> HostTier::check() const {
  if (auto broken = host_.check()) return broken;
  if (auto broken = check_counts()) return broken;
  std::vector<int> readers(host_.records().size());
  std::vector<int> writers(host_.records().size());
  for (const Copy& copy : copies_) {
    const auto slot = static_cast<std::size_t>(copy.slot);
    const bool reads = std::holds_alternative<copy::Loading>(copy.state) ||
                       std::holds_alternative<copy::Orphaned>(copy.state) ||
                       std::holds_alternative<copy::OrphanedLate>(copy.state);
    const bool writes =
        std::holds_alternative<copy::Storing>(copy.state) || std::holds_alternative<copy::StoringLate>(copy.state);
    if (reads) ++readers[slot];
    if (writes) ++writers[slot];
    if (writes && pool_.records()[static_cast<std::size_t>(copy.block)].borrowed == block::Borrowed::no) {
      return "block " + std::to_string(copy.block) + " is written back and does not know it";
    }
  }
  for (std::size_t slot = 0; slot < readers.size(); ++slot) {
    const host::Record& record = host_.records()[slot];
    if (record.readers != readers[slot] || writers[slot] != (record.kind == host::Kind::filling)) {
      return "host slot " + std::to_string(slot) + " is held by other copies than it knows";
    }
  }
  return std::nullopt;
}

}  // namespace tokenrelay::scheduler

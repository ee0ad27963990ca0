#include "tokenrelay/scheduler/host_pool.hpp"

namespace tokenrelay::scheduler {

using host::Access;
using host::Kind;
using host::Record;

HostPool::HostPool(int slots) : records_(static_cast<std::size_t>(slots)), index_(static_cast<std::size_t>(slots)) {
  for (HostSlotId id = 0; id < slots; ++id) push_back(empty_, id);
}

void HostPool::push_back(List& list, HostSlotId id) noexcept {
  at(id).previous = list.tail;
  at(id).next = no_host_slot;
  (list.tail == no_host_slot ? list.head : at(list.tail).next) = id;
  list.tail = id;
  ++list.size;
}

void HostPool::unlink(List& list, HostSlotId id) noexcept {
  const Record& record = at(id);
  (record.previous == no_host_slot ? list.head : at(record.previous).next) = record.next;
  (record.next == no_host_slot ? list.tail : at(record.next).previous) = record.previous;
  --list.size;
}

void HostPool::forget(HostSlotId id) noexcept {
  if (!at(id).indexed) return;
  index_.erase(at(id).hash, id);
  at(id).indexed = false;
}

void HostPool::empty(host::Empty&& slot) noexcept { push_back(empty_, Access::dissolve(std::move(slot))); }

HostPool::Found HostPool::find(const Hash128& hash) const noexcept {
  const HostSlotId id = index_.find(hash, records_);
  if (id == no_host_slot) return {};
  return {id, at(id).kind != Kind::filling};
}

std::optional<host::Filling> HostPool::take(const Hash128& hash) noexcept {
  HostSlotId id = empty_.head;
  if (id == no_host_slot) {
    id = kept_.head;
    if (id == no_host_slot) return std::nullopt;
    unlink(kept_, id);
    forget(id);
    empty(on(Access::make<host::Kept>(id), host::Evict{records_}));
    id = empty_.head;
  }
  unlink(empty_, id);
  at(id).hash = hash;
  at(id).indexed = true;
  index_.insert(hash, id);
  return on(Access::make<host::Empty>(id), host::Take{records_});
}

void HostPool::keep(host::Filling&& slot) noexcept {
  push_back(kept_, Access::dissolve(on(std::move(slot), host::Keep{records_})));
}

void HostPool::drop(host::Filling&& slot) noexcept {
  forget(Access::number(slot));
  empty(on(std::move(slot), host::Drop{records_}));
}

host::Loan HostPool::lend(HostSlotId id) noexcept {
  if (at(id).kind == Kind::kept) {
    unlink(kept_, id);
    Access::dissolve(on(Access::make<host::Kept>(id), host::Lend{records_}));
  } else {
    Access::dissolve(on(Access::make<host::Lent>(id), host::Lend{records_}));
  }
  return Access::make<host::Loan>(id);
}

void HostPool::give_back(host::Loan&& loan, bool believed) noexcept {
  const HostSlotId id = Access::dissolve(std::move(loan));
  if (!believed) forget(id);
  if (at(id).readers > 1) {
    Access::dissolve(on(Access::make<host::Lent>(id), host::Return{records_}));
  } else if (at(id).indexed) {
    push_back(kept_, Access::dissolve(on(Access::make<host::Lent>(id), host::ReturnLast{records_})));
  } else {
    empty(on(Access::make<host::Lent>(id), host::Discard{records_}));
  }
}

void HostPool::touch(const Hash128& hash) noexcept {
  const HostSlotId id = index_.find(hash, records_);
  if (id == no_host_slot || at(id).kind != Kind::kept) return;
  unlink(kept_, id);
  push_back(kept_, id);
}

std::optional<std::string> HostPool::check_list(const List& list, Kind kind) const {
  int walked = 0;
  for (HostSlotId id = list.head; id != no_host_slot && walked <= list.size; id = at(id).next, ++walked) {
    if (at(id).kind != kind) return "host slot " + std::to_string(id) + " is in the list of another state";
  }
  if (walked != list.size) return "a list of host slots has another length than its count";
  return std::nullopt;
}

std::optional<std::string> HostPool::check() const {
  if (auto broken = check_list(empty_, Kind::empty)) return broken;
  if (auto broken = check_list(kept_, Kind::kept)) return broken;
  int empty = 0;
  int kept = 0;
  for (HostSlotId id = 0; id < slots(); ++id) {
    const Record& record = at(id);
    const std::string which = "host slot " + std::to_string(id);
    empty += record.kind == Kind::empty;
    kept += record.kind == Kind::kept;
    if ((record.readers > 0) != (record.kind == Kind::lent)) return which + " has readers that do not fit its state";
    if (record.indexed && index_.find(record.hash, records_) != id) return which + " is not found by its hash";
    if (record.indexed && record.kind == Kind::empty) return which + " can be found though it holds nothing";
    const bool found = record.kind == Kind::kept || record.kind == Kind::filling;
    if (found && !record.indexed) return which + " is kept or filled and cannot be found";
  }
  if (empty != empty_.size || kept != kept_.size) return "the counts of empty and kept host slots are wrong";
  return std::nullopt;
}

}  // namespace tokenrelay::scheduler

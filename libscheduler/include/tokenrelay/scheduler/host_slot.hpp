// Host memory as a second tier of KV: the states of one of its slots, which has room for one block.
//
//     Empty -> Filling -> Kept <-> Lent
//       ^---------'---------'-------'
//
// Empty and Kept slots belong to the pool. A Filling slot has one owner, the write-back that fills it; a Lent one has
// as many readers as loads read it, and each holds a Loan. Handles are linear, as those of blocks are (block.hpp).
#pragma once

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "tokenrelay/scheduler/assert.hpp"
#include "tokenrelay/scheduler/fsm.hpp"
#include "tokenrelay/scheduler/siphash.hpp"

namespace tokenrelay::scheduler {

using HostSlotId = std::int32_t;
inline constexpr HostSlotId no_host_slot = -1;

namespace host {

enum class Kind : std::uint8_t { empty, filling, kept, lent };

struct Access;

class Key {
  friend struct Access;
  constexpr Key() noexcept = default;
};

/// The right to one slot: moved, consumed by a transition, never copied and never dropped.
class Handle {
 public:
  Handle(Key, HostSlotId id) noexcept : id_(id) {}
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  Handle(Handle&& other) noexcept : id_(std::exchange(other.id_, no_host_slot)) {}
  Handle& operator=(Handle&& other) noexcept {
    TR_ASSERT(id_ == no_host_slot, "a host slot's handle was overwritten");
    id_ = std::exchange(other.id_, no_host_slot);
    return *this;
  }
  ~Handle() { TR_ASSERT(id_ == no_host_slot, "a host slot's handle was dropped"); }

 private:
  friend struct Access;
  HostSlotId id_;
};

/// Holds nothing.
struct Empty : Handle {
  using Handle::Handle;
  static constexpr std::string_view name = "Empty";
  static constexpr Kind kind = Kind::empty;
};
/// A write-back may write it; nobody reads it.
struct Filling : Handle {
  using Handle::Handle;
  static constexpr std::string_view name = "Filling";
  static constexpr Kind kind = Kind::filling;
};
/// Holds the block of its hash, and nobody reads it: evicted when room is needed.
struct Kept : Handle {
  using Handle::Handle;
  static constexpr std::string_view name = "Kept";
  static constexpr Kind kind = Kind::kept;
};
/// Holds the block of its hash, and at least one load may read it. The pool holds this state; loads hold a Loan.
struct Lent : Handle {
  using Handle::Handle;
  static constexpr std::string_view name = "Lent";
  static constexpr Kind kind = Kind::lent;
};

/// One load's share of a Lent slot. Not a state.
struct Loan : Handle {
  using Handle::Handle;
};

struct Record {
  Hash128 hash;                        // of what it holds, or will hold
  HostSlotId previous = no_host_slot;  // neighbours in the list of empty or of kept slots
  HostSlotId next = no_host_slot;
  std::int32_t readers = 0;  // > 0 exactly when lent
  Kind kind = Kind::empty;
  bool indexed = false;  // found by its hash; a filling one too, so that no block is written twice
};
static_assert(sizeof(Record) == 32);
using Records = std::vector<Record>;

struct Access {
  template <class T>
  static T make(HostSlotId id) noexcept {
    return T(Key{}, id);
  }
  static HostSlotId number(const Handle& handle) noexcept {
    TR_ASSERT(handle.id_ != no_host_slot, "a moved-from handle of a host slot was used");
    return handle.id_;
  }
  static HostSlotId dissolve(Handle&& handle) noexcept {
    const HostSlotId id = number(handle);
    handle.id_ = no_host_slot;
    return id;
  }
  /// The one place where a slot changes its kind.
  template <class Next, class State>
  static Next become(State&& state, Records& records) noexcept {
    static_assert(!std::is_lvalue_reference_v<State>);
    const HostSlotId id = dissolve(std::forward<State>(state));
    Record& record = records[static_cast<std::size_t>(id)];
    TR_ASSERT(record.kind == State::kind, "a host slot's handle does not match it");
    record.kind = Next::kind;
    return make<Next>(id);
  }
  static Record& record(const Handle& handle, Records& records) noexcept {
    return records[static_cast<std::size_t>(number(handle))];
  }
};

struct Take {  // a block will be written back
  static constexpr std::string_view name = "Take";
  Records& records;
};
struct Keep {  // the block is written
  static constexpr std::string_view name = "Keep";
  Records& records;
};
struct Drop {  // the write-back ended in vain, or came too late to be believed
  static constexpr std::string_view name = "Drop";
  Records& records;
};
struct Lend {  // one more load reads it
  static constexpr std::string_view name = "Lend";
  Records& records;
};
struct Return {  // one of several loads ended
  static constexpr std::string_view name = "Return";
  Records& records;
};
struct ReturnLast {  // the only load ended, and the index finds the slot
  static constexpr std::string_view name = "ReturnLast";
  Records& records;
};
struct Discard {  // the only load ended, and a load of it had failed: the index finds it no more
  static constexpr std::string_view name = "Discard";
  Records& records;
};
struct Evict {  // another block needs the room
  static constexpr std::string_view name = "Evict";
  Records& records;
};

inline Filling on(Empty&& state, Take&& event) noexcept {
  return Access::become<Filling>(std::move(state), event.records);
}
inline Kept on(Filling&& state, Keep&& event) noexcept { return Access::become<Kept>(std::move(state), event.records); }
inline Empty on(Filling&& state, Drop&& event) noexcept {
  TR_ASSERT(!Access::record(state, event.records).indexed, "a slot that holds nothing is still in the index");
  return Access::become<Empty>(std::move(state), event.records);
}
inline Lent on(Kept&& state, Lend&& event) noexcept {
  Access::record(state, event.records).readers = 1;
  return Access::become<Lent>(std::move(state), event.records);
}
inline Lent on(Lent&& state, Lend&& event) noexcept {
  ++Access::record(state, event.records).readers;
  return Access::become<Lent>(std::move(state), event.records);
}
inline Lent on(Lent&& state, Return&& event) noexcept {
  Record& record = Access::record(state, event.records);
  TR_ASSERT(record.readers > 1, "Return needs another reader");
  --record.readers;
  return Access::become<Lent>(std::move(state), event.records);
}
inline Kept on(Lent&& state, ReturnLast&& event) noexcept {
  Record& record = Access::record(state, event.records);
  TR_ASSERT(record.readers == 1 && record.indexed, "ReturnLast needs exactly one reader, and a slot that can be found");
  record.readers = 0;
  return Access::become<Kept>(std::move(state), event.records);
}
inline Empty on(Lent&& state, Discard&& event) noexcept {
  Record& record = Access::record(state, event.records);
  TR_ASSERT(record.readers == 1 && !record.indexed, "Discard needs one reader, and a slot that cannot be found");
  record.readers = 0;
  return Access::become<Empty>(std::move(state), event.records);
}
inline Empty on(Kept&& state, Evict&& event) noexcept {
  TR_ASSERT(!Access::record(state, event.records).indexed, "an evicted slot is still in the index");
  return Access::become<Empty>(std::move(state), event.records);
}

namespace why {
inline constexpr std::string_view nothing = "it holds nothing";
inline constexpr std::string_view filling = "a write-back may write it";
inline constexpr std::string_view not_filling = "no write-back writes it";
inline constexpr std::string_view full = "it holds a block";
inline constexpr std::string_view not_lent = "no load reads it";
inline constexpr std::string_view lent = "a load may read it";
}  // namespace why

inline constexpr std::array table{
    fsm::to<Empty, Take, Filling>(),
    fsm::reject<Empty, Keep>(why::not_filling),
    fsm::reject<Empty, Drop>(why::not_filling),
    fsm::reject<Empty, Lend>(why::nothing),
    fsm::reject<Empty, Return>(why::not_lent),
    fsm::reject<Empty, ReturnLast>(why::not_lent),
    fsm::reject<Empty, Discard>(why::not_lent),
    fsm::reject<Empty, Evict>(why::nothing),

    fsm::reject<Filling, Take>(why::filling),
    fsm::to<Filling, Keep, Kept>(),
    fsm::to<Filling, Drop, Empty>(),
    fsm::reject<Filling, Lend>(why::filling),
    fsm::reject<Filling, Return>(why::not_lent),
    fsm::reject<Filling, ReturnLast>(why::not_lent),
    fsm::reject<Filling, Discard>(why::not_lent),
    fsm::reject<Filling, Evict>(why::filling),

    fsm::reject<Kept, Take>(why::full),
    fsm::reject<Kept, Keep>(why::not_filling),
    fsm::reject<Kept, Drop>(why::not_filling),
    fsm::to<Kept, Lend, Lent>(),
    fsm::reject<Kept, Return>(why::not_lent),
    fsm::reject<Kept, ReturnLast>(why::not_lent),
    fsm::reject<Kept, Discard>(why::not_lent),
    fsm::to<Kept, Evict, Empty>(),

    fsm::reject<Lent, Take>(why::full),
    fsm::reject<Lent, Keep>(why::not_filling),
    fsm::reject<Lent, Drop>(why::not_filling),
    fsm::to<Lent, Lend, Lent>(),
    fsm::to<Lent, Return, Lent>(),
    fsm::to<Lent, ReturnLast, Kept>(),
    fsm::to<Lent, Discard, Empty>(),
    fsm::reject<Lent, Evict>(why::lent),
};

}  // namespace host

struct HostSlotFsm {
  static constexpr std::string_view name = "host_slot";
  static constexpr std::string_view initial = "Empty";
  using States = fsm::Types<host::Empty, host::Filling, host::Kept, host::Lent>;
  using Events = fsm::Types<host::Take, host::Keep, host::Drop, host::Lend, host::Return, host::ReturnLast,
                            host::Discard, host::Evict>;
  static constexpr std::span<const fsm::Row> table{host::table};
};
static_assert(fsm::verified<HostSlotFsm>());

}  // namespace tokenrelay::scheduler

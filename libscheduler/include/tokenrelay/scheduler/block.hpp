// Local KV ownership: the states of a block as move-only handles, and what may happen to each.
//
//     Free -> Writable -> InFlight -> Writable -> Sealed <-> Cached -> Free
//                            \-> Quarantined -> Free
//
// Free and Cached blocks belong to the pool. A Writable, InFlight or Quarantined block has one owner, who holds its
// handle. A Sealed block belongs to the pool; whoever reads it holds a SealedPin. A handle that is dropped aborts the
// process: a block leaves its owner only by a transition.
#pragma once

#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "tokenrelay/scheduler/assert.hpp"
#include "tokenrelay/scheduler/fsm.hpp"
#include "tokenrelay/scheduler/siphash.hpp"

namespace tokenrelay::scheduler {

using BlockId = std::int32_t;
inline constexpr BlockId no_block = -1;

namespace block {

enum class Kind : std::uint8_t { free, writable, in_flight, quarantined, sealed, cached };
/// Whether one of a block's pins is a write-back's; `for_long`: one past its deadline.
enum class Borrowed : std::uint8_t { no, yes, for_long };

/// Who may make a handle from a number, or turn one back: the transitions and the pool.
struct Access;

class Key {
  friend struct Access;
  constexpr Key() noexcept = default;
};

/// The right to one block. Linear: it is moved, and consumed by a transition; it is never copied and never dropped.
class Handle {
 public:
  Handle(Key, BlockId id) noexcept : id_(id) {}
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  Handle(Handle&& other) noexcept : id_(std::exchange(other.id_, no_block)) {}
  Handle& operator=(Handle&& other) noexcept {
    TR_ASSERT(id_ == no_block, "a block handle was overwritten");
    id_ = std::exchange(other.id_, no_block);
    return *this;
  }
  ~Handle() { TR_ASSERT(id_ == no_block, "a block handle was dropped"); }

 private:
  friend struct Access;
  BlockId id_;
};

/// Nobody's; its content is meaningless.
struct Free : Handle {
  using Handle::Handle;
  static constexpr std::string_view name = "Free";
  static constexpr Kind kind = Kind::free;
};
/// Owned by one sequence; no launched step writes it.
struct Writable : Handle {
  using Handle::Handle;
  static constexpr std::string_view name = "Writable";
  static constexpr Kind kind = Kind::writable;
};
/// Owned by one sequence; at least one launched step writes it, or a transfer, or a load from host memory.
struct InFlight : Handle {
  using Handle::Handle;
  static constexpr std::string_view name = "InFlight";
  static constexpr Kind kind = Kind::in_flight;
};
/// Its sequence is over, but a launched step, a transfer or a load may still write it: nobody gets it until that has
/// ended.
struct Quarantined : Handle {
  using Handle::Handle;
  static constexpr std::string_view name = "Quarantined";
  static constexpr Kind kind = Kind::quarantined;
};
/// Full and immutable, pinned by at least one reader. The pool holds this state; readers hold a SealedPin.
struct Sealed : Handle {
  using Handle::Handle;
  static constexpr std::string_view name = "Sealed";
  static constexpr Kind kind = Kind::sealed;
};
/// Full and immutable, pinned by nobody, found by its hash: evicted when the pool needs room.
struct Cached : Handle {
  using Handle::Handle;
  static constexpr std::string_view name = "Cached";
  static constexpr Kind kind = Kind::cached;
};

/// One reader's share of a Sealed block. Not a state: a Sealed block has as many pins as readers.
struct SealedPin : Handle {
  using Handle::Handle;
};

/// What the pool knows of a block. The kind mirrors the handle's type, so that a wrong handle is caught at run time
/// too.
struct Record {
  Hash128 hash;                 // when promised or sealed
  std::int64_t used_us = 0;     // when the last reader left, of a cached block (evictor.hpp, as what is marked so)
  std::int32_t pins = 0;        // > 0 exactly when sealed
  BlockId previous = no_block;  // neighbours in the list of free or of cached blocks
  BlockId next = no_block;
  BlockId parent = no_block;  // [evictor] the block before it, when it was indexed; that one may be gone
  std::int32_t children = 0;  // [evictor] blocks in the index that have it as parent
  Kind kind = Kind::free;
  std::uint8_t writers = 0;     // launched steps that write it; > 0 exactly when in_flight or quarantined
  bool indexed = false;         // the prefix index maps `hash` to this block
  bool watched = false;         // a waiting sequence wants to know when it is sealed or given up
  bool nameless = false;        // sealed without a hash: a prompt's partial last block, for a peer to read
  bool covered = false;         // [evictor] it is cached and has children: they are evicted first
  std::uint8_t uses = 0;        // [evictor] readers that found it, beyond the sequence that computed it
  std::uint8_t reuse_kind = 0;  // [evictor] of a cached block, or of one that only a write-back pins
  Borrowed borrowed = Borrowed::no;
  std::uint8_t part = 0;  // tokens of one that is indexed and not full: the end of a text, to copy from; 0: full
};
static_assert(sizeof(Record) == 56);

/// Every block's record, and how many blocks are in the states that only launched steps and writers know: counted in
/// the one place where a block changes its state. The pool counts free and cached ones; all others are sealed. So a pin
/// on one of a prompt's thousand cached blocks counts nothing.
class Records {
 public:
  explicit Records(std::size_t blocks) : records_(blocks) {}
  Record& operator[](std::size_t block) noexcept { return records_[block]; }
  const Record& operator[](std::size_t block) const noexcept { return records_[block]; }
  [[nodiscard]] std::size_t size() const noexcept { return records_.size(); }
  [[nodiscard]] std::size_t capacity() const noexcept { return records_.capacity(); }
  static constexpr bool counts(Kind kind) noexcept {
    return kind == Kind::writable || kind == Kind::in_flight || kind == Kind::quarantined;
  }
  [[nodiscard]] int count(Kind kind) const noexcept { return counts_[static_cast<std::size_t>(kind)]; }

 private:
  friend struct Access;
  template <Kind last, Kind next>
  void change(Record& record) noexcept {
    if constexpr (counts(last)) --counts_[static_cast<std::size_t>(last)];
    if constexpr (counts(next)) ++counts_[static_cast<std::size_t>(next)];
    record.kind = next;
  }

  std::vector<Record> records_;
  std::array<int, 6> counts_{};  // by Kind, 0 for those that are not counted
};

struct Access {
  template <class T>
  static T make(BlockId id) noexcept {
    return T(Key{}, id);
  }
  static BlockId number(const Handle& handle) noexcept {
    TR_ASSERT(handle.id_ != no_block, "a moved-from block handle was used");
    return handle.id_;
  }
  static BlockId dissolve(Handle&& handle) noexcept {
    const BlockId id = number(handle);
    handle.id_ = no_block;
    return id;
  }
  /// The one place where a block changes its kind.
  template <class Next, class State>
  static Next become(State&& state, Records& records) noexcept {
    static_assert(!std::is_lvalue_reference_v<State>);
    const BlockId id = dissolve(std::forward<State>(state));
    Record& record = records[static_cast<std::size_t>(id)];
    TR_ASSERT(record.kind == State::kind, "a block handle does not match its block");
    records.change<State::kind, Next::kind>(record);
    return make<Next>(id);
  }
  static Record& record(const Handle& handle, Records& records) noexcept {
    return records[static_cast<std::size_t>(number(handle))];
  }
};

// Events. `Land` and `LandLast` differ by what the record says (asserted), so that each has one next state.
struct Take {  // a sequence needs room
  static constexpr std::string_view name = "Take";
  Records& records;
};
struct Launch {  // a step that writes the block was planned
  static constexpr std::string_view name = "Launch";
  Records& records;
};
struct Land {  // one of several launched writers was committed
  static constexpr std::string_view name = "Land";
  Records& records;
};
struct LandLast {  // the only launched writer was committed
  static constexpr std::string_view name = "LandLast";
  Records& records;
};
struct Seal {  // every token of it is computed
  static constexpr std::string_view name = "Seal";
  Records& records;
};
struct Release {  // its owner is done with it
  static constexpr std::string_view name = "Release";
  Records& records;
};
struct Abandon {  // its owner ended while a launched step writes it
  static constexpr std::string_view name = "Abandon";
  Records& records;
};
struct Pin {  // one more reader
  static constexpr std::string_view name = "Pin";
  Records& records;
};
struct Unpin {  // one of several readers is done
  static constexpr std::string_view name = "Unpin";
  Records& records;
};
struct UnpinLast {  // the last reader is done, and the index finds the block
  static constexpr std::string_view name = "UnpinLast";
  Records& records;
};
struct Discard {  // the last reader is done, and the index finds another block with the same content
  static constexpr std::string_view name = "Discard";
  Records& records;
};
struct Evict {  // the pool needs room
  static constexpr std::string_view name = "Evict";
  Records& records;
};

inline Writable on(Free&& state, Take&& event) noexcept {
  return Access::become<Writable>(std::move(state), event.records);
}
inline InFlight on(Writable&& state, Launch&& event) noexcept {
  Access::record(state, event.records).writers = 1;
  return Access::become<InFlight>(std::move(state), event.records);
}
inline InFlight on(InFlight&& state, Launch&& event) noexcept {
  ++Access::record(state, event.records).writers;
  return Access::become<InFlight>(std::move(state), event.records);
}
inline InFlight on(InFlight&& state, Land&& event) noexcept {
  Record& record = Access::record(state, event.records);
  TR_ASSERT(record.writers > 1, "Land needs another writer");
  --record.writers;
  return Access::become<InFlight>(std::move(state), event.records);
}
inline Writable on(InFlight&& state, LandLast&& event) noexcept {
  Record& record = Access::record(state, event.records);
  TR_ASSERT(record.writers == 1, "LandLast needs exactly one writer");
  record.writers = 0;
  return Access::become<Writable>(std::move(state), event.records);
}
inline Quarantined on(InFlight&& state, Abandon&& event) noexcept {
  return Access::become<Quarantined>(std::move(state), event.records);
}
inline Quarantined on(Quarantined&& state, Land&& event) noexcept {
  Record& record = Access::record(state, event.records);
  TR_ASSERT(record.writers > 1, "Land needs another writer");
  --record.writers;
  return Access::become<Quarantined>(std::move(state), event.records);
}
inline Free on(Quarantined&& state, LandLast&& event) noexcept {
  Record& record = Access::record(state, event.records);
  TR_ASSERT(record.writers == 1, "LandLast needs exactly one writer");
  record.writers = 0;
  return Access::become<Free>(std::move(state), event.records);
}
inline Sealed on(Writable&& state, Seal&& event) noexcept {
  Access::record(state, event.records).pins = 1;
  return Access::become<Sealed>(std::move(state), event.records);
}
inline Free on(Writable&& state, Release&& event) noexcept {
  return Access::become<Free>(std::move(state), event.records);
}
inline Sealed on(Sealed&& state, Pin&& event) noexcept {
  ++Access::record(state, event.records).pins;
  return Access::become<Sealed>(std::move(state), event.records);
}
inline Sealed on(Sealed&& state, Unpin&& event) noexcept {
  Record& record = Access::record(state, event.records);
  TR_ASSERT(record.pins > 1, "Unpin needs another reader");
  --record.pins;
  return Access::become<Sealed>(std::move(state), event.records);
}
inline Cached on(Sealed&& state, UnpinLast&& event) noexcept {
  Record& record = Access::record(state, event.records);
  TR_ASSERT(record.pins == 1 && record.indexed, "UnpinLast needs exactly one reader, and a block that can be found");
  record.pins = 0;
  return Access::become<Cached>(std::move(state), event.records);
}
inline Free on(Sealed&& state, Discard&& event) noexcept {
  Record& record = Access::record(state, event.records);
  TR_ASSERT(record.pins == 1 && !record.indexed, "Discard needs exactly one reader, and a block that cannot be found");
  record.pins = 0;
  return Access::become<Free>(std::move(state), event.records);
}
inline Sealed on(Cached&& state, Pin&& event) noexcept {
  Access::record(state, event.records).pins = 1;
  return Access::become<Sealed>(std::move(state), event.records);
}
inline Free on(Cached&& state, Evict&& event) noexcept {
  TR_ASSERT(!Access::record(state, event.records).indexed, "an evicted block is still in the index");
  return Access::become<Free>(std::move(state), event.records);
}

/// Blocks that may be read by others than their writer.
template <class T>
concept Readable = std::is_same_v<std::remove_cvref_t<T>, SealedPin>;

/// The number of a block that may be read, for a descriptor or another sequence's table.
template <class T>
[[nodiscard]] BlockId read(const T& pin) noexcept {
  static_assert(Readable<T>, "only a Sealed block may be read: a pin on it is needed");
  return Access::number(pin);
}

/// The number for the table of the one sequence that owns (or pins) the block.
template <class T>
  requires std::is_same_v<T, Writable> || Readable<T>
[[nodiscard]] BlockId table_entry(const T& handle) noexcept {
  return Access::number(handle);
}

namespace why {
inline constexpr std::string_view nobody = "nobody owns the block";
inline constexpr std::string_view pool_owns = "the pool owns the block; a reader needs a pin first";
inline constexpr std::string_view owned = "the block has an owner already";
inline constexpr std::string_view not_launched = "no launched step writes the block";
inline constexpr std::string_view immutable = "a sealed block is never written again";
inline constexpr std::string_view in_flight = "a launched step writes the block";
inline constexpr std::string_view not_sealed = "only a sealed block has readers";
inline constexpr std::string_view not_cached = "only a cached block is evicted";
inline constexpr std::string_view quarantined = "its sequence is over; the block only waits for launched steps";
inline constexpr std::string_view pinned = "a reader has it pinned; it is given back pin by pin";
}  // namespace why

inline constexpr std::array table{
    fsm::to<Free, Take, Writable>(),
    fsm::reject<Free, Launch>(why::nobody),
    fsm::reject<Free, Land>(why::not_launched),
    fsm::reject<Free, LandLast>(why::not_launched),
    fsm::reject<Free, Seal>(why::nobody),
    fsm::reject<Free, Release>(why::nobody),
    fsm::reject<Free, Abandon>(why::nobody),
    fsm::reject<Free, Pin>(why::not_sealed),
    fsm::reject<Free, Unpin>(why::not_sealed),
    fsm::reject<Free, UnpinLast>(why::not_sealed),
    fsm::reject<Free, Discard>(why::not_sealed),
    fsm::reject<Free, Evict>(why::not_cached),

    fsm::reject<Writable, Take>(why::owned),
    fsm::to<Writable, Launch, InFlight>(),
    fsm::reject<Writable, Land>(why::not_launched),
    fsm::reject<Writable, LandLast>(why::not_launched),
    fsm::to<Writable, Seal, Sealed>(),
    fsm::to<Writable, Release, Free>(),
    fsm::reject<Writable, Abandon>("no launched step writes the block: it is released"),
    fsm::reject<Writable, Pin>(why::not_sealed),
    fsm::reject<Writable, Unpin>(why::not_sealed),
    fsm::reject<Writable, UnpinLast>(why::not_sealed),
    fsm::reject<Writable, Discard>(why::not_sealed),
    fsm::reject<Writable, Evict>(why::not_cached),

    fsm::reject<InFlight, Take>(why::owned),
    fsm::to<InFlight, Launch, InFlight>(),
    fsm::to<InFlight, Land, InFlight>(),
    fsm::to<InFlight, LandLast, Writable>(),
    fsm::reject<InFlight, Seal>(why::in_flight),
    fsm::reject<InFlight, Release>(why::in_flight),
    fsm::to<InFlight, Abandon, Quarantined>(),
    fsm::reject<InFlight, Pin>(why::not_sealed),
    fsm::reject<InFlight, Unpin>(why::not_sealed),
    fsm::reject<InFlight, UnpinLast>(why::not_sealed),
    fsm::reject<InFlight, Discard>(why::not_sealed),
    fsm::reject<InFlight, Evict>(why::not_cached),

    fsm::reject<Quarantined, Take>(why::quarantined),
    fsm::reject<Quarantined, Launch>(why::quarantined),
    fsm::to<Quarantined, Land, Quarantined>(),
    fsm::to<Quarantined, LandLast, Free>(),
    fsm::reject<Quarantined, Seal>(why::quarantined),
    fsm::reject<Quarantined, Release>(why::in_flight),
    fsm::reject<Quarantined, Abandon>(why::quarantined),
    fsm::reject<Quarantined, Pin>(why::not_sealed),
    fsm::reject<Quarantined, Unpin>(why::not_sealed),
    fsm::reject<Quarantined, UnpinLast>(why::not_sealed),
    fsm::reject<Quarantined, Discard>(why::not_sealed),
    fsm::reject<Quarantined, Evict>(why::not_cached),

    fsm::reject<Sealed, Take>(why::owned),
    fsm::reject<Sealed, Launch>(why::immutable),
    fsm::reject<Sealed, Land>(why::not_launched),
    fsm::reject<Sealed, LandLast>(why::not_launched),
    fsm::reject<Sealed, Seal>(why::immutable),
    fsm::reject<Sealed, Release>(why::pinned),
    fsm::reject<Sealed, Abandon>(why::not_launched),
    fsm::to<Sealed, Pin, Sealed>(),
    fsm::to<Sealed, Unpin, Sealed>(),
    fsm::to<Sealed, UnpinLast, Cached>(),
    fsm::to<Sealed, Discard, Free>(),
    fsm::reject<Sealed, Evict>(why::pinned),

    fsm::reject<Cached, Take>(why::pool_owns),
    fsm::reject<Cached, Launch>(why::immutable),
    fsm::reject<Cached, Land>(why::not_launched),
    fsm::reject<Cached, LandLast>(why::not_launched),
    fsm::reject<Cached, Seal>(why::immutable),
    fsm::reject<Cached, Release>(why::pool_owns),
    fsm::reject<Cached, Abandon>(why::not_launched),
    fsm::to<Cached, Pin, Sealed>(),
    fsm::reject<Cached, Unpin>(why::pool_owns),
    fsm::reject<Cached, UnpinLast>(why::pool_owns),
    fsm::reject<Cached, Discard>(why::pool_owns),
    fsm::to<Cached, Evict, Free>(),
};

}  // namespace block

struct BlockFsm {
  static constexpr std::string_view name = "block";
  static constexpr std::string_view initial = "Free";
  using States =
      fsm::Types<block::Free, block::Writable, block::InFlight, block::Quarantined, block::Sealed, block::Cached>;
  using Events = fsm::Types<block::Take, block::Launch, block::Land, block::LandLast, block::Seal, block::Release,
                            block::Abandon, block::Pin, block::Unpin, block::UnpinLast, block::Discard, block::Evict>;
  static constexpr std::span<const fsm::Row> table{block::table};
};
static_assert(fsm::verified<BlockFsm>());

using block::SealedPin;
using WritableBlock = block::Writable;
using InFlightBlock = block::InFlight;
using QuarantinedBlock = block::Quarantined;

}  // namespace tokenrelay::scheduler

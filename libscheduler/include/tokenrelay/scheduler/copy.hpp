// A copy of one block between device and host memory, in flight: the states of it, which hold what it may touch.
//
//     Vacant -> Storing -> Vacant           Vacant -> Loading -> Landed, Failed -> Vacant
//                  \-> StoringLate -> Vacant              \-> Orphaned -> OrphanedLate -> Vacant
//
// A write-back (Storing) holds a pin on the device block that it reads and the host slot that it fills. A load holds a
// share of the host slot that it reads; the device block that it writes belongs to the sequence that waits for it, and
// becomes the copy's own when that sequence gives up (Orphaned). Whatever the clock says, nothing of it is given back
// before whoever copies has said that the copy ended: a deadline that passes is reported, and nothing more.
#pragma once

#include <array>
#include <utility>
#include <vector>

#include "tokenrelay/scheduler/block.hpp"
#include "tokenrelay/scheduler/host_pool.hpp"
#include "tokenrelay/scheduler/pool.hpp"

namespace tokenrelay::scheduler {

using CopyIndex = std::int32_t;  // of the tier's table of copies

namespace copy {

struct Unique {
  Unique() noexcept = default;
  Unique(const Unique&) = delete;
  Unique& operator=(const Unique&) = delete;
  Unique(Unique&&) noexcept = default;
  Unique& operator=(Unique&&) noexcept = default;
  ~Unique() = default;
};

// States.
struct Vacant : Unique {  // no copy
  static constexpr std::string_view name = "Vacant";
};
struct Storing {  // a write-back may read the block and write the slot
  static constexpr std::string_view name = "Storing";
  SealedPin source;
  host::Filling slot;
};
struct StoringLate {  // the same, past its deadline: it was reported, and what it writes is not believed
  static constexpr std::string_view name = "StoringLate";
  SealedPin source;
  host::Filling slot;
};
struct Loading {  // a load may read the slot and write a block of a sequence that waits for it
  static constexpr std::string_view name = "Loading";
  host::Loan slot;
};
struct Landed : Unique {  // it ended well; its sequence takes note of its blocks in their order
  static constexpr std::string_view name = "Landed";
};
struct Failed : Unique {  // it ended in vain; its sequence computes the block
  static constexpr std::string_view name = "Failed";
};
struct Orphaned {  // a load whose sequence gave up: nobody gets the block before the copy has ended
  static constexpr std::string_view name = "Orphaned";
  host::Loan slot;
  QuarantinedBlock target;
};
struct OrphanedLate {  // the same, past its deadline: it was reported
  static constexpr std::string_view name = "OrphanedLate";
  host::Loan slot;
  QuarantinedBlock target;
};

// Events.
struct Store {  // a sealed block is to be written back
  static constexpr std::string_view name = "Store";
  SealedPin source;
  host::Filling slot;
};
struct Load {  // a block of a waiting prompt is to be loaded
  static constexpr std::string_view name = "Load";
  host::Loan slot;
};
struct Done {  // whoever copies says: it ended well
  static constexpr std::string_view name = "Done";
  BlockPool& pool;
  HostPool& host;
};
struct Fail {  // whoever copies says: it ended in vain
  static constexpr std::string_view name = "Fail";
  BlockPool& pool;
  HostPool& host;
};
struct Expire {  // its deadline passed
  static constexpr std::string_view name = "Expire";
  BlockPool& pool;
};
struct Orphan {  // the sequence that waits for it gave up, and leaves it the block
  static constexpr std::string_view name = "Orphan";
  QuarantinedBlock target;
};
struct Collect {  // its sequence took note of how it ended
  static constexpr std::string_view name = "Collect";
};

/// Nobody writes the block any more.
inline void free_target(QuarantinedBlock&& target, BlockPool& pool) noexcept {
  pool.put(on(std::move(target), block::LandLast{pool.records()}));
}

inline Storing on(Vacant&&, Store&& event) noexcept { return {std::move(event.source), std::move(event.slot)}; }
inline Loading on(Vacant&&, Load&& event) noexcept { return {std::move(event.slot)}; }
inline Vacant on(Storing&& state, Done&& event) noexcept {
  event.host.keep(std::move(state.slot));
  event.pool.give_back(std::move(state.source));
  return {};
}
inline Vacant on(Storing&& state, Fail&& event) noexcept {
  event.host.drop(std::move(state.slot));
  event.pool.give_back(std::move(state.source));
  return {};
}
inline StoringLate on(Storing&& state, Expire&& event) noexcept {
  event.pool.lent_for_long(state.source);
  return {std::move(state.source), std::move(state.slot)};
}
inline Vacant on(StoringLate&& state, Done&& event) noexcept {
  event.host.drop(std::move(state.slot));
  event.pool.give_back(std::move(state.source));
  return {};
}
inline Vacant on(StoringLate&& state, Fail&& event) noexcept {
  event.host.drop(std::move(state.slot));
  event.pool.give_back(std::move(state.source));
  return {};
}
inline Landed on(Loading&& state, Done&& event) noexcept {
  event.host.give_back(std::move(state.slot), true);
  return {};
}
inline Failed on(Loading&& state, Fail&& event) noexcept {
  event.host.give_back(std::move(state.slot), false);
  return {};
}
inline Orphaned on(Loading&& state, Orphan&& event) noexcept {
  return {std::move(state.slot), std::move(event.target)};
}
inline Vacant on(Landed&&, Collect&&) noexcept { return {}; }
inline Vacant on(Failed&&, Collect&&) noexcept { return {}; }
inline OrphanedLate on(Orphaned&& state, Expire&&) noexcept { return {std::move(state.slot), std::move(state.target)}; }
inline Vacant on(Orphaned&& state, Done&& event) noexcept {
  event.host.give_back(std::move(state.slot), true);
  free_target(std::move(state.target), event.pool);
  return {};
}
inline Vacant on(Orphaned&& state, Fail&& event) noexcept {
  event.host.give_back(std::move(state.slot), false);
  free_target(std::move(state.target), event.pool);
  return {};
}
inline Vacant on(OrphanedLate&& state, Done&& event) noexcept {
  event.host.give_back(std::move(state.slot), true);
  free_target(std::move(state.target), event.pool);
  return {};
}
inline Vacant on(OrphanedLate&& state, Fail&& event) noexcept {
  event.host.give_back(std::move(state.slot), false);
  free_target(std::move(state.target), event.pool);
  return {};
}

namespace why {
inline constexpr std::string_view none = "there is no copy";
inline constexpr std::string_view in_flight = "a copy is in flight already";
inline constexpr std::string_view over = "it ended already";
inline constexpr std::string_view late = "its deadline passed already, and was reported";
inline constexpr std::string_view no_sequence = "no sequence waits for it";
inline constexpr std::string_view not_over = "it may still read or write";
inline constexpr std::string_view sequence_first = "its sequence gives the block up first";
inline constexpr std::string_view not_collected = "its sequence has not taken note of it";
}  // namespace why

inline constexpr std::array table{
    fsm::to<Vacant, Store, Storing>(),
    fsm::to<Vacant, Load, Loading>(),
    fsm::reject<Vacant, Done>(why::none),
    fsm::reject<Vacant, Fail>(why::none),
    fsm::reject<Vacant, Expire>(why::none),
    fsm::reject<Vacant, Orphan>(why::none),
    fsm::reject<Vacant, Collect>(why::none),

    fsm::reject<Storing, Store>(why::in_flight),
    fsm::reject<Storing, Load>(why::in_flight),
    fsm::to<Storing, Done, Vacant>(),
    fsm::to<Storing, Fail, Vacant>(),
    fsm::to<Storing, Expire, StoringLate>(),
    fsm::reject<Storing, Orphan>(why::no_sequence),
    fsm::reject<Storing, Collect>(why::not_over),

    fsm::reject<StoringLate, Store>(why::in_flight),
    fsm::reject<StoringLate, Load>(why::in_flight),
    fsm::to<StoringLate, Done, Vacant>(),
    fsm::to<StoringLate, Fail, Vacant>(),
    fsm::reject<StoringLate, Expire>(why::late),
    fsm::reject<StoringLate, Orphan>(why::no_sequence),
    fsm::reject<StoringLate, Collect>(why::not_over),

    fsm::reject<Loading, Store>(why::in_flight),
    fsm::reject<Loading, Load>(why::in_flight),
    fsm::to<Loading, Done, Landed>(),
    fsm::to<Loading, Fail, Failed>(),
    fsm::reject<Loading, Expire>(why::sequence_first),
    fsm::to<Loading, Orphan, Orphaned>(),
    fsm::reject<Loading, Collect>(why::not_over),

    fsm::reject<Landed, Store>(why::not_collected),
    fsm::reject<Landed, Load>(why::not_collected),
    fsm::reject<Landed, Done>(why::over),
    fsm::reject<Landed, Fail>(why::over),
    fsm::reject<Landed, Expire>(why::over),
    fsm::reject<Landed, Orphan>(why::over),
    fsm::to<Landed, Collect, Vacant>(),

    fsm::reject<Failed, Store>(why::not_collected),
    fsm::reject<Failed, Load>(why::not_collected),
    fsm::reject<Failed, Done>(why::over),
    fsm::reject<Failed, Fail>(why::over),
    fsm::reject<Failed, Expire>(why::over),
    fsm::reject<Failed, Orphan>(why::over),
    fsm::to<Failed, Collect, Vacant>(),

    fsm::reject<Orphaned, Store>(why::in_flight),
    fsm::reject<Orphaned, Load>(why::in_flight),
    fsm::to<Orphaned, Done, Vacant>(),
    fsm::to<Orphaned, Fail, Vacant>(),
    fsm::to<Orphaned, Expire, OrphanedLate>(),
    fsm::reject<Orphaned, Orphan>(why::no_sequence),
    fsm::reject<Orphaned, Collect>(why::not_over),

    fsm::reject<OrphanedLate, Store>(why::in_flight),
    fsm::reject<OrphanedLate, Load>(why::in_flight),
    fsm::to<OrphanedLate, Done, Vacant>(),
    fsm::to<OrphanedLate, Fail, Vacant>(),
    fsm::reject<OrphanedLate, Expire>(why::late),
    fsm::reject<OrphanedLate, Orphan>(why::no_sequence),
    fsm::reject<OrphanedLate, Collect>(why::not_over),
};

/// The loads that a sequence waits for, in the order of its blocks. Linear: emptied before it is dropped.
class Batch {
 public:
  Batch() noexcept = default;
  explicit Batch(std::size_t room) { copies_.reserve(room); }
  Batch(const Batch&) = delete;
  Batch& operator=(const Batch&) = delete;
  Batch(Batch&& other) noexcept : copies_(std::exchange(other.copies_, {})), head_(std::exchange(other.head_, 0)) {}
  Batch& operator=(Batch&& other) noexcept {
    TR_ASSERT(empty(), "loads in flight were overwritten");
    copies_ = std::exchange(other.copies_, {});
    head_ = std::exchange(other.head_, 0);
    return *this;
  }
  ~Batch() { TR_ASSERT(empty(), "loads in flight were dropped"); }

  [[nodiscard]] bool empty() const noexcept { return head_ == copies_.size(); }
  [[nodiscard]] std::span<const CopyIndex> copies() const noexcept { return std::span(copies_).subspan(head_); }
  [[nodiscard]] CopyIndex front() const noexcept { return copies_[head_]; }
  void push_back(CopyIndex copy) noexcept {
    TR_ASSERT(copies_.size() < copies_.capacity(), "more loads than there is room for");
    copies_.push_back(copy);
  }
  CopyIndex pop_front() noexcept {
    TR_ASSERT(!empty(), "a load was taken that is not there");
    return copies_[head_++];
  }

 private:
  std::vector<CopyIndex> copies_;
  std::size_t head_ = 0;
};

}  // namespace copy

struct CopyFsm {
  static constexpr std::string_view name = "copy";
  static constexpr std::string_view initial = "Vacant";
  using States = fsm::Types<copy::Vacant, copy::Storing, copy::StoringLate, copy::Loading, copy::Landed, copy::Failed,
                            copy::Orphaned, copy::OrphanedLate>;
  using Events = fsm::Types<copy::Store, copy::Load, copy::Done, copy::Fail, copy::Expire, copy::Orphan, copy::Collect>;
  static constexpr std::span<const fsm::Row> table{copy::table};
};
static_assert(fsm::verified<CopyFsm>());

}  // namespace tokenrelay::scheduler

// Ownership of KV between processes: the life of a handle, the name under which a peer may read a sequence's blocks.
//
//     Unused -> Reserved -> Offered -> Claimed -> Transferring -> Adopted -> Released
//                                         \-> Quarantined -> Returned -> Reclaimed, or -> Fenced; from anywhere -> Lost
//
// This table is the only one. A worker's scheduler keeps the pins of what it offers in these states (the compiler
// checks that they leave only where the table says), the ledger applies it through the Python binding, and the model
// that SPIN explores is generated from it. handle_laws.hpp has what is asserted of it. A handle is claimed once: who
// declined leaves the owner to reserve another one, so that the machine never goes back and an old message is never a
// new one.
#pragma once

#include <array>
#include <concepts>
#include <cstddef>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "tokenrelay/scheduler/assert.hpp"
#include "tokenrelay/scheduler/block.hpp"
#include "tokenrelay/scheduler/fsm.hpp"
#include "tokenrelay/scheduler/handle_laws.hpp"

namespace tokenrelay::scheduler {

namespace handle {

/// The pins that a handle has on its owner's sealed blocks. Linear, since a pin is: who drops it with pins aborts.
class Stake {
 public:
  Stake() = default;
  /// Room for `blocks_max` pins, so that none of the transitions allocates.
  explicit Stake(std::size_t blocks_max) { pins_.reserve(blocks_max); }
  Stake(const Stake&) = delete;
  Stake& operator=(const Stake&) = delete;
  Stake(Stake&&) noexcept = default;
  Stake& operator=(Stake&& other) noexcept {
    TR_ASSERT(pins_.empty(), "a stake with pins was overwritten");
    pins_ = std::move(other.pins_);
    return *this;
  }
  ~Stake() = default;

  void add(SealedPin&& pin) noexcept {
    TR_ASSERT(pins_.size() < pins_.capacity(), "a stake has more blocks than were reserved");
    pins_.push_back(std::move(pin));
  }
  /// All pins of another one, behind those that are here.
  void join(Stake&& more) noexcept {
    for (SealedPin& pin : more.pins_) add(std::move(pin));
    more.pins_.clear();
  }
  /// In the order the blocks were sealed; for descriptors.
  [[nodiscard]] std::span<const SealedPin> pins() const noexcept { return pins_; }
  [[nodiscard]] bool empty() const noexcept { return pins_.empty(); }
  [[nodiscard]] std::size_t size() const noexcept { return pins_.size(); }
  /// The last pin, for BlockPool::unpin: the end of a chain is given back first.
  [[nodiscard]] SealedPin take() noexcept {
    TR_ASSERT(!pins_.empty(), "a stake has no pin left");
    SealedPin pin = std::move(pins_.back());
    pins_.pop_back();
    return pin;
  }

 private:
  std::vector<SealedPin> pins_;
};

/// A state that holds nothing.
struct Empty {
  Empty() = default;
  Empty(Empty&&) noexcept = default;
  Empty& operator=(Empty&&) noexcept = default;
};
/// A state that holds the owner's pins.
struct Holding {
  explicit Holding(Stake&& held) noexcept : stake(std::move(held)) {}
  Stake stake;
};

/// The number belongs to nobody.
struct Unused : Empty {
  static constexpr std::string_view name = "Unused";
  static constexpr StateFacts facts{};
};
/// The owner admitted the sequence and fills its blocks; no peer knows them.
struct Reserved : Holding {
  using Holding::Holding;
  static constexpr std::string_view name = "Reserved";
  static constexpr StateFacts facts{Party::owner, false, Deadline::offer, "Reclaim", Party::owner};
};
/// Claimable; it may be still being filled.
struct Offered : Holding {
  using Holding::Holding;
  static constexpr std::string_view name = "Offered";
  static constexpr StateFacts facts{Party::owner, false, Deadline::claim, "Reclaim", Party::owner};
};
/// A peer has room, and may read what is sealed.
struct Claimed : Holding {
  using Holding::Holding;
  static constexpr std::string_view name = "Claimed";
  static constexpr StateFacts facts{Party::owner, true, Deadline::start, "Expire", Party::ledger};
};
/// The claimant reads; each progress it reports renews the lease.
struct Transferring : Holding {
  using Holding::Holding;
  static constexpr std::string_view name = "Transferring";
  static constexpr StateFacts facts{Party::owner, true, Deadline::progress, "Expire", Party::ledger};
};
/// The claim is over, and cannot be adopted; the claimant may be reading until it acknowledges or is cut off.
struct Quarantined : Holding {
  using Holding::Holding;
  static constexpr std::string_view name = "Quarantined";
  static constexpr StateFacts facts{Party::owner, true, Deadline::answer, "Fence", Party::owner};
};
/// The claimant said that it reads no more, without adopting.
struct Returned : Holding {
  using Holding::Holding;
  static constexpr std::string_view name = "Returned";
  static constexpr StateFacts facts{Party::owner, false, Deadline::reclaim, "Reclaim", Party::owner};
};
/// The claimant has validated all it read and goes on alone.
struct Adopted : Holding {
  using Holding::Holding;
  static constexpr std::string_view name = "Adopted";
  static constexpr StateFacts facts{Party::owner, false, Deadline::release, "Release", Party::owner};
};
/// The end: handed over, and the owner's pins are given back.
struct Released : Empty {
  static constexpr std::string_view name = "Released";
  static constexpr StateFacts facts{};
};
/// The end: the owner took the blocks back.
struct Reclaimed : Empty {
  static constexpr std::string_view name = "Reclaimed";
  static constexpr StateFacts facts{};
};
/// The end: the claimant was cut off, and the owner has the blocks.
struct Fenced : Empty {
  static constexpr std::string_view name = "Fenced";
  static constexpr StateFacts facts{};
};
/// The end: the owner's life is over, and the blocks with it.
struct Lost : Empty {
  static constexpr std::string_view name = "Lost";
  static constexpr StateFacts facts{};
};

// Events. Those that end a handle name the place that gets its pins.
struct Reserve {  // the owner admits a sequence
  static constexpr std::string_view name = "Reserve";
  static constexpr EventFacts facts{.party = Party::owner};
  Stake room;
};
struct Fill {  // a launched step writes blocks of it
  static constexpr std::string_view name = "Fill";
  static constexpr EventFacts facts{.party = Party::owner, .crosses = false};
};
struct Seal {  // some more extents can be read, and never change again
  static constexpr std::string_view name = "Seal";
  static constexpr EventFacts facts{.party = Party::owner};
  Stake& sealed;  // emptied when the handle takes it
};
struct Offer {
  static constexpr std::string_view name = "Offer";
  static constexpr EventFacts facts{.party = Party::owner};
};
struct Claim {  // a peer has made room
  static constexpr std::string_view name = "Claim";
  static constexpr EventFacts facts{.party = Party::anyone};
};
struct Transfer {  // the claimant has begun to read, or goes on reading
  static constexpr std::string_view name = "Transfer";
  static constexpr EventFacts facts{.party = Party::claimant};
};
struct Adopt {  // the claimant read and validated everything
  static constexpr std::string_view name = "Adopt";
  static constexpr EventFacts facts{.party = Party::claimant, .guard = Guard::all_sealed, .proof = Proof::acknowledged};
};
struct Decline {  // the claimant reads no more and will not adopt
  static constexpr std::string_view name = "Decline";
  static constexpr EventFacts facts{.party = Party::claimant, .proof = Proof::acknowledged};
};
struct Acknowledge {  // the claimant was told to stop, and reads no more
  static constexpr std::string_view name = "Acknowledge";
  static constexpr EventFacts facts{.party = Party::claimant, .proof = Proof::acknowledged};
};
struct Release {  // the owner gives its pins back after the adoption
  static constexpr std::string_view name = "Release";
  static constexpr EventFacts facts{.party = Party::owner};
  Stake& freed;
};
struct Quarantine {  // the owner wants its blocks back while a peer may be reading
  static constexpr std::string_view name = "Quarantine";
  static constexpr EventFacts facts{.party = Party::owner};
};
struct Expire {  // the claim's deadline is over, or the claimant's lease
  static constexpr std::string_view name = "Expire";
  static constexpr EventFacts facts{.party = Party::ledger, .guard = Guard::overdue};
};
struct Reclaim {  // the owner takes its blocks back
  static constexpr std::string_view name = "Reclaim";
  static constexpr EventFacts facts{.party = Party::owner};
  Stake& freed;
};
struct Fence {  // the claimant was cut off from the owner's memory
  static constexpr std::string_view name = "Fence";
  static constexpr EventFacts facts{.party = Party::ledger, .guard = Guard::cut_off, .proof = Proof::fenced};
  Stake& freed;
};
struct Lose {  // the owner's life is over
  static constexpr std::string_view name = "Lose";
  static constexpr EventFacts facts{.party = Party::ledger, .guard = Guard::owner_gone, .proof = Proof::gone};
  Stake& freed;
};

template <class T>
concept Holds = std::derived_from<T, Holding>;
/// Blocks of it may be being written.
template <class T>
concept Filling =
    std::same_as<T, Reserved> || std::same_as<T, Offered> || std::same_as<T, Claimed> || std::same_as<T, Transferring>;
/// Its claim stands.
template <class T>
concept Reading = std::same_as<T, Claimed> || std::same_as<T, Transferring>;
template <class T>
concept PeerMayTouch = Reading<T> || std::same_as<T, Quarantined>;
template <class T>
concept Unread = std::same_as<T, Reserved> || std::same_as<T, Offered> || std::same_as<T, Returned>;

inline Reserved on(Unused&&, Reserve&& event) noexcept { return Reserved(std::move(event.room)); }
template <Filling State>
State on(State&& state, Fill&&) noexcept {
  return State(std::move(state.stake));
}
template <Filling State>
State on(State&& state, Seal&& event) noexcept {
  state.stake.join(std::move(event.sealed));
  return State(std::move(state.stake));
}
inline Offered on(Reserved&& state, Offer&&) noexcept { return Offered(std::move(state.stake)); }
inline Claimed on(Offered&& state, Claim&&) noexcept { return Claimed(std::move(state.stake)); }
template <Reading State>
Transferring on(State&& state, Transfer&&) noexcept {
  return Transferring(std::move(state.stake));
}
template <Reading State>
Adopted on(State&& state, Adopt&&) noexcept {
  return Adopted(std::move(state.stake));
}
template <PeerMayTouch State>
Returned on(State&& state, Decline&&) noexcept {
  return Returned(std::move(state.stake));
}
inline Returned on(Quarantined&& state, Acknowledge&&) noexcept { return Returned(std::move(state.stake)); }
inline Released on(Adopted&& state, Release&& event) noexcept {
  event.freed = std::move(state.stake);
  return {};
}
template <Reading State>
Quarantined on(State&& state, Quarantine&&) noexcept {
  return Quarantined(std::move(state.stake));
}
template <Reading State>
Quarantined on(State&& state, Expire&&) noexcept {
  return Quarantined(std::move(state.stake));
}
template <Unread State>
Reclaimed on(State&& state, Reclaim&& event) noexcept {
  event.freed = std::move(state.stake);
  return {};
}
template <PeerMayTouch State>
Fenced on(State&& state, Fence&& event) noexcept {
  event.freed = std::move(state.stake);
  return {};
}
template <Holds State>
Lost on(State&& state, Lose&& event) noexcept {
  event.freed = std::move(state.stake);
  return {};
}

namespace why {
inline constexpr std::string_view nobody = "the handle is not reserved";
inline constexpr std::string_view in_use = "the handle is in use";
inline constexpr std::string_view offered = "the handle is offered already";
inline constexpr std::string_view not_offered = "the handle is not offered";
inline constexpr std::string_view not_claimed = "nobody claimed the handle";
inline constexpr std::string_view claimed = "the handle is claimed already";
inline constexpr std::string_view taken = "another one claimed the handle";
inline constexpr std::string_view not_handed_over = "nothing was handed over: it is reclaimed";
inline constexpr std::string_view not_read = "nobody reads: it is reclaimed";
inline constexpr std::string_view not_asked = "nobody asked for it: the claimant declines";
inline constexpr std::string_view may_read = "the claimant may be reading: it answers, or is fenced";
inline constexpr std::string_view withdrawn = "the claim is over: the claimant stops and acknowledges";
inline constexpr std::string_view quarantined = "the handle is quarantined already";
inline constexpr std::string_view returned = "the claimant declined: it is reclaimed";
inline constexpr std::string_view adopted = "the handle was adopted";
inline constexpr std::string_view complete = "an adopted handle has every extent";
inline constexpr std::string_view handed_over = "it was handed over: it is released";
inline constexpr std::string_view done_reading = "nobody reads an adopted handle";
inline constexpr std::string_view over = "the handle is over";
}  // namespace why

using Events = fsm::Types<Reserve, Fill, Seal, Offer, Claim, Transfer, Adopt, Decline, Acknowledge, Release, Quarantine,
                          Expire, Reclaim, Fence, Lose>;

/// Nothing happens to a handle that is over.
template <class State, class... Event>
consteval std::array<fsm::Row, sizeof...(Event)> over(fsm::Types<Event...>) {
  return {fsm::reject<State, Event>(why::over)...};
}

template <std::size_t... size>
consteval auto join(const std::array<fsm::Row, size>&... parts) {
  std::array<fsm::Row, (size + ...)> all{};
  std::size_t at = 0;
  const auto append = [&](const auto& part) {
    for (const fsm::Row& row : part) all[at++] = row;
  };
  (append(parts), ...);
  return all;
}

inline constexpr std::array open_table{
    fsm::to<Unused, Reserve, Reserved>(),
    fsm::reject<Unused, Fill>(why::nobody),
    fsm::reject<Unused, Seal>(why::nobody),
    fsm::reject<Unused, Offer>(why::nobody),
    fsm::reject<Unused, Claim>(why::nobody),
    fsm::reject<Unused, Transfer>(why::nobody),
    fsm::reject<Unused, Adopt>(why::nobody),
    fsm::reject<Unused, Decline>(why::nobody),
    fsm::reject<Unused, Acknowledge>(why::nobody),
    fsm::reject<Unused, Release>(why::nobody),
    fsm::reject<Unused, Quarantine>(why::nobody),
    fsm::reject<Unused, Expire>(why::nobody),
    fsm::reject<Unused, Reclaim>(why::nobody),
    fsm::reject<Unused, Fence>(why::nobody),
    fsm::reject<Unused, Lose>(why::nobody),

    fsm::reject<Reserved, Reserve>(why::in_use),
    fsm::to<Reserved, Fill, Reserved>(),
    fsm::to<Reserved, Seal, Reserved>(),
    fsm::to<Reserved, Offer, Offered>(),
    fsm::reject<Reserved, Claim>(why::not_offered),
    fsm::reject<Reserved, Transfer>(why::not_claimed),
    fsm::reject<Reserved, Adopt>(why::not_claimed),
    fsm::reject<Reserved, Decline>(why::not_claimed),
    fsm::reject<Reserved, Acknowledge>(why::not_claimed),
    fsm::reject<Reserved, Release>(why::not_handed_over),
    fsm::reject<Reserved, Quarantine>(why::not_read),
    fsm::reject<Reserved, Expire>(why::not_read),
    fsm::to<Reserved, Reclaim, Reclaimed>(),
    fsm::reject<Reserved, Fence>(why::not_claimed),
    fsm::to<Reserved, Lose, Lost>(),

    fsm::reject<Offered, Reserve>(why::in_use),
    fsm::to<Offered, Fill, Offered>(),
    fsm::to<Offered, Seal, Offered>(),
    fsm::reject<Offered, Offer>(why::offered),
    fsm::to<Offered, Claim, Claimed>(),
    fsm::reject<Offered, Transfer>(why::not_claimed),
    fsm::reject<Offered, Adopt>(why::not_claimed),
    fsm::reject<Offered, Decline>(why::not_claimed),
    fsm::reject<Offered, Acknowledge>(why::not_claimed),
    fsm::reject<Offered, Release>(why::not_handed_over),
    fsm::reject<Offered, Quarantine>(why::not_read),
    fsm::reject<Offered, Expire>(why::not_read),
    fsm::to<Offered, Reclaim, Reclaimed>(),
    fsm::reject<Offered, Fence>(why::not_claimed),
    fsm::to<Offered, Lose, Lost>(),

    fsm::reject<Claimed, Reserve>(why::in_use),
    fsm::to<Claimed, Fill, Claimed>(),
    fsm::to<Claimed, Seal, Claimed>(),
    fsm::reject<Claimed, Offer>(why::claimed),
    fsm::reject<Claimed, Claim>(why::taken),
    fsm::to<Claimed, Transfer, Transferring>(),
    fsm::to<Claimed, Adopt, Adopted>(),
    fsm::to<Claimed, Decline, Returned>(),
    fsm::reject<Claimed, Acknowledge>(why::not_asked),
    fsm::reject<Claimed, Release>(why::may_read),
    fsm::to<Claimed, Quarantine, Quarantined>(),
    fsm::to<Claimed, Expire, Quarantined>(),
    fsm::reject<Claimed, Reclaim>(why::may_read),
    fsm::to<Claimed, Fence, Fenced>(),
    fsm::to<Claimed, Lose, Lost>(),

    fsm::reject<Transferring, Reserve>(why::in_use),
    fsm::to<Transferring, Fill, Transferring>(),
    fsm::to<Transferring, Seal, Transferring>(),
    fsm::reject<Transferring, Offer>(why::claimed),
    fsm::reject<Transferring, Claim>(why::taken),
    fsm::to<Transferring, Transfer, Transferring>(),
    fsm::to<Transferring, Adopt, Adopted>(),
    fsm::to<Transferring, Decline, Returned>(),
    fsm::reject<Transferring, Acknowledge>(why::not_asked),
    fsm::reject<Transferring, Release>(why::may_read),
    fsm::to<Transferring, Quarantine, Quarantined>(),
    fsm::to<Transferring, Expire, Quarantined>(),
    fsm::reject<Transferring, Reclaim>(why::may_read),
    fsm::to<Transferring, Fence, Fenced>(),
    fsm::to<Transferring, Lose, Lost>(),

    fsm::reject<Quarantined, Reserve>(why::in_use),
    fsm::reject<Quarantined, Fill>(why::withdrawn),
    fsm::reject<Quarantined, Seal>(why::withdrawn),
    fsm::reject<Quarantined, Offer>(why::withdrawn),
    fsm::reject<Quarantined, Claim>(why::withdrawn),
    fsm::reject<Quarantined, Transfer>(why::withdrawn),
    fsm::reject<Quarantined, Adopt>(why::withdrawn),
    fsm::to<Quarantined, Decline, Returned>(),
    fsm::to<Quarantined, Acknowledge, Returned>(),
    fsm::reject<Quarantined, Release>(why::may_read),
    fsm::reject<Quarantined, Quarantine>(why::quarantined),
    fsm::reject<Quarantined, Expire>(why::quarantined),
    fsm::reject<Quarantined, Reclaim>(why::may_read),
    fsm::to<Quarantined, Fence, Fenced>(),
    fsm::to<Quarantined, Lose, Lost>(),

    fsm::reject<Returned, Reserve>(why::in_use),
    fsm::reject<Returned, Fill>(why::returned),
    fsm::reject<Returned, Seal>(why::returned),
    fsm::reject<Returned, Offer>(why::returned),
    fsm::reject<Returned, Claim>(why::returned),
    fsm::reject<Returned, Transfer>(why::returned),
    fsm::reject<Returned, Adopt>(why::returned),
    fsm::reject<Returned, Decline>(why::returned),
    fsm::reject<Returned, Acknowledge>(why::returned),
    fsm::reject<Returned, Release>(why::not_handed_over),
    fsm::reject<Returned, Quarantine>(why::returned),
    fsm::reject<Returned, Expire>(why::returned),
    fsm::to<Returned, Reclaim, Reclaimed>(),
    fsm::reject<Returned, Fence>(why::returned),
    fsm::to<Returned, Lose, Lost>(),

    fsm::reject<Adopted, Reserve>(why::in_use),
    fsm::reject<Adopted, Fill>(why::complete),
    fsm::reject<Adopted, Seal>(why::complete),
    fsm::reject<Adopted, Offer>(why::adopted),
    fsm::reject<Adopted, Claim>(why::adopted),
    fsm::reject<Adopted, Transfer>(why::adopted),
    fsm::reject<Adopted, Adopt>(why::adopted),
    fsm::reject<Adopted, Decline>(why::adopted),
    fsm::reject<Adopted, Acknowledge>(why::adopted),
    fsm::to<Adopted, Release, Released>(),
    fsm::reject<Adopted, Quarantine>(why::adopted),
    fsm::reject<Adopted, Expire>(why::adopted),
    fsm::reject<Adopted, Reclaim>(why::handed_over),
    fsm::reject<Adopted, Fence>(why::done_reading),
    fsm::to<Adopted, Lose, Lost>(),
};
inline constexpr auto table =
    join(open_table, over<Released>(Events{}), over<Reclaimed>(Events{}), over<Fenced>(Events{}), over<Lost>(Events{}));

}  // namespace handle

struct HandleFsm {
  static constexpr std::string_view name = "kv_handle";
  static constexpr std::string_view initial = "Unused";
  using States = fsm::Types<handle::Unused, handle::Reserved, handle::Offered, handle::Claimed, handle::Transferring,
                            handle::Quarantined, handle::Returned, handle::Adopted, handle::Released, handle::Reclaimed,
                            handle::Fenced, handle::Lost>;
  using Events = handle::Events;
  static constexpr std::span<const fsm::Row> table{handle::table};
};
static_assert(fsm::verified<HandleFsm>());
static_assert(handle::lawful<HandleFsm>());

}  // namespace tokenrelay::scheduler

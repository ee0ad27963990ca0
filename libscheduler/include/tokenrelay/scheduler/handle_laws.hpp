// What a machine of KV ownership between processes must satisfy, checked on its table and on the facts of its states
// and events. `static_assert(handle::lawful<Machine>())` does not compile for a machine that breaks a law.
//
//     struct Claimed { static constexpr std::string_view name = "Claimed";
//                      static constexpr StateFacts facts{.blocks = Party::owner, .peer_may_touch = true,
//                                                        .deadline = Deadline::start, .duty = "Expire",
//                                                        .actor = Party::ledger}; ... };
//     struct Expire { static constexpr std::string_view name = "Expire";
//                     static constexpr EventFacts facts{.party = Party::ledger, .guard = Guard::overdue}; ... };
//
// The numbers are those of the laws in docs/kv-ownership.md.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "tokenrelay/scheduler/fsm.hpp"

namespace tokenrelay::scheduler::handle {

/// Who: the owner has the blocks in its pool, the claimant is the peer that reads them, the ledger keeps the books.
enum class Party : std::uint8_t { nobody, owner, claimant, anyone, ledger };

/// What must have happened when a state's deadline is over.
enum class Deadline : std::uint8_t {
  none,
  offer,     // the owner offered it
  claim,     // a peer claimed it
  start,     // the claimant has begun to read (or adopted)
  progress,  // the claimant read some more; renewed by each Transfer
  answer,    // the claimant acknowledged that it reads no more
  reclaim,   // the owner took its blocks back
  release,   // the owner gave its pins back
};

/// What else must hold for an event to be accepted, beside the state; the ledger checks it.
enum class Guard : std::uint8_t {
  none,
  all_sealed,  // every extent is sealed
  overdue,     // the deadline is over, or the claimant's lease is
  cut_off,     // the claimant cannot reach the blocks, and nothing it sends counts any more
  owner_gone,  // the owner's life is over, and its memory with it
};

/// What an event says about the peer's access: nothing, or why nobody reads any more after it.
enum class Proof : std::uint8_t {
  none,
  acknowledged,  // the peer itself says that it reads no more
  fenced,        // it was cut off
  gone,          // the memory is gone
};

struct StateFacts {
  Party blocks = Party::nobody;  // whose the blocks are
  bool peer_may_touch = false;   // a peer may be reading them
  Deadline deadline = Deadline::none;
  std::string_view duty = {};   // the event that is due when the deadline is over
  Party actor = Party::nobody;  // who must see to it
};

struct EventFacts {
  Party party = Party::nobody;  // whose event it is; the ledger's: on its own knowledge, or on the owner's word
  Guard guard = Guard::none;
  Proof proof = Proof::none;
  bool crosses = true;  // it reaches the ledger; false: it stays in the owner's process
};

constexpr std::string_view name_of(Party party) {
  constexpr std::array<std::string_view, 5> names{"nobody", "owner", "claimant", "anyone", "ledger"};
  return names[static_cast<std::size_t>(party)];
}
constexpr std::string_view name_of(Deadline deadline) {
  constexpr std::array<std::string_view, 8> names{"none",     "offer",  "claim",   "start",
                                                  "progress", "answer", "reclaim", "release"};
  return names[static_cast<std::size_t>(deadline)];
}
constexpr std::string_view name_of(Guard guard) {
  constexpr std::array<std::string_view, 5> names{"none", "all_sealed", "overdue", "cut_off", "owner_gone"};
  return names[static_cast<std::size_t>(guard)];
}
constexpr std::string_view name_of(Proof proof) {
  constexpr std::array<std::string_view, 4> names{"none", "acknowledged", "fenced", "gone"};
  return names[static_cast<std::size_t>(proof)];
}

namespace detail {

template <class Facts>
struct Named {
  std::string_view name;
  Facts facts;
};

template <class Facts, class... T>
consteval std::array<Named<Facts>, sizeof...(T)> facts_of(fsm::Types<T...>) {
  return {Named<Facts>{T::name, T::facts}...};
}

template <class Facts>
constexpr Facts fact(std::span<const Named<Facts>> all, std::string_view name) {
  for (const auto& one : all) {
    if (one.name == name) return one.facts;
  }
  return {};
}

/// A machine as data, so that a law is one loop.
struct View {
  std::span<const Named<StateFacts>> states;
  std::span<const Named<EventFacts>> events;
  std::span<const fsm::Row> table;
  std::string_view initial;

  [[nodiscard]] constexpr StateFacts state(std::string_view name) const { return fact(states, name); }
  [[nodiscard]] constexpr EventFacts event(std::string_view name) const { return fact(events, name); }
  [[nodiscard]] constexpr std::string_view next(std::string_view state, std::string_view event) const {
    for (const fsm::Row& row : table) {
      if (row.state == state && row.event == event) return row.next;
    }
    return {};
  }
  [[nodiscard]] constexpr bool leaves(std::string_view state) const {
    for (const fsm::Row& row : table) {
      if (row.state == state && !row.next.empty() && row.next != state) return true;
    }
    return false;
  }
  /// Whether a path leads from one state to another that `goal` is true of.
  template <class Goal>
  [[nodiscard]] constexpr bool reaches(std::string_view from, Goal goal) const {
    std::array<std::string_view, 32> reached{from};
    std::size_t count = 1;
    for (std::size_t i = 0; i < count; ++i) {
      if (goal(reached[i])) return true;
      for (const fsm::Row& row : table) {
        if (row.state != reached[i] || row.next.empty()) continue;
        bool known = false;
        for (std::size_t j = 0; j < count; ++j) known = known || reached[j] == row.next;
        if (!known) reached[count++] = row.next;
      }
    }
    return false;
  }
};

/// Law 2: nobody may be reading after a transition, though somebody may have been before, only with a proof.
constexpr bool reading_ends_by_proof(const View& fsm) {
  for (const fsm::Row& row : fsm.table) {
    if (row.next.empty() || !fsm.state(row.state).peer_may_touch || fsm.state(row.next).peer_may_touch) continue;
    if (fsm.event(row.event).proof == Proof::none) return false;
  }
  return true;
}

/// Law 2: a clock proves nothing, the claimant speaks for itself only, and it is not the claimant that says it is dead.
constexpr bool proofs_are_of_who_knows(const View& fsm) {
  for (const auto& [name, event] : fsm.events) {
    if (event.guard == Guard::overdue && event.proof != Proof::none) return false;
    if (event.proof == Proof::acknowledged && event.party != Party::claimant) return false;
    if (event.proof == Proof::fenced && (event.guard != Guard::cut_off || event.party != Party::ledger)) return false;
    if (event.proof == Proof::gone && (event.guard != Guard::owner_gone || event.party != Party::ledger)) return false;
  }
  return true;
}

/// Law 2: nobody reads what he did not claim.
constexpr bool reading_begins_by_claim(const View& fsm) {
  for (const fsm::Row& row : fsm.table) {
    if (row.next.empty() || fsm.state(row.state).peer_may_touch || !fsm.state(row.next).peer_may_touch) continue;
    if (fsm.event(row.event).party != Party::anyone) return false;
  }
  return !fsm.state(fsm.initial).peer_may_touch;
}

/// Law 3: whatever holds blocks has a deadline, an act that is due then, and somebody who may do it.
constexpr bool deadlines_have_actors(const View& fsm) {
  for (const auto& [name, state] : fsm.states) {
    const bool holds = state.blocks != Party::nobody;
    if (holds != (state.deadline != Deadline::none) || holds != (state.actor != Party::nobody)) return false;
    if (!holds) continue;
    const std::string_view next = fsm.next(name, state.duty);
    if (next.empty() || next == name) return false;
    const Party party = fsm.event(state.duty).party;
    if (party != state.actor && party != Party::ledger) return false;
  }
  return true;
}

/// Law 3: where a peer may touch the blocks, what a deadline sets off is the fencing: it ends the claim and keeps the
/// blocks, or it has cut the peer off.
constexpr bool deadlines_fence_readers(const View& fsm) {
  for (const auto& [name, state] : fsm.states) {
    if (!state.peer_may_touch) continue;
    const bool keeps = fsm.state(fsm.next(name, state.duty)).peer_may_touch;
    if (!keeps && fsm.event(state.duty).proof != Proof::fenced) return false;
  }
  return true;
}

/// Law 3: when everybody only does what is due, every handle comes to an end.
constexpr bool duties_end_everything(const View& fsm) {
  for (const auto& [name, facts] : fsm.states) {
    std::string_view at = name;
    for (std::size_t steps = 0; steps <= fsm.states.size() && fsm.state(at).blocks != Party::nobody; ++steps) {
      at = fsm.next(at, fsm.state(at).duty);
    }
    if (fsm.state(at).blocks != Party::nobody) return false;
  }
  return true;
}

/// Law 5: an end can be reached from everywhere, and every state from the first one.
constexpr bool ends_are_reachable(const View& fsm) {
  for (const auto& [name, facts] : fsm.states) {
    const std::string_view here = name;
    if (!fsm.reaches(here, [&](std::string_view state) { return !fsm.leaves(state); })) return false;
    if (!fsm.reaches(fsm.initial, [&](std::string_view state) { return state == here; })) return false;
  }
  return true;
}

/// Law 5: what is over holds nothing, and what holds something is not over.
constexpr bool ends_hold_nothing(const View& fsm) {
  for (const auto& [name, state] : fsm.states) {
    const bool holds = state.blocks != Party::nobody;
    if (holds != (fsm.leaves(name) && name != fsm.initial)) return false;
    if (!holds && state.peer_may_touch) return false;
  }
  return true;
}

/// Law 6: a dead owner ends whatever it held, and a dead claimant whatever it claimed.
constexpr bool death_ends_everything(const View& fsm) {
  for (const auto& [name, state] : fsm.states) {
    bool lost = false;
    bool fenced = false;
    for (const auto& [event, facts] : fsm.events) {
      if (fsm.next(name, event).empty()) continue;
      lost = lost || facts.proof == Proof::gone;
      fenced = fenced || facts.proof == Proof::fenced;
    }
    if (state.blocks != Party::nobody && !lost) return false;
    if (state.peer_may_touch && !fenced) return false;
  }
  return true;
}

/// Old and repeated messages: a state that was left never comes back, so an event that was meant for it is refused.
constexpr bool never_goes_back(const View& fsm) {
  for (const fsm::Row& row : fsm.table) {
    if (row.next.empty() || row.next == row.state) continue;
    if (fsm.reaches(row.next, [&](std::string_view state) { return state == row.state; })) return false;
  }
  return true;
}

template <class Fsm>
inline constexpr auto states_of = facts_of<StateFacts>(typename Fsm::States{});
template <class Fsm>
inline constexpr auto events_of = facts_of<EventFacts>(typename Fsm::Events{});
template <class Fsm>
inline constexpr View view_of{states_of<Fsm>, events_of<Fsm>, Fsm::table, Fsm::initial};

}  // namespace detail

/// True for a machine that satisfies the laws; does not compile for any other.
template <class Fsm>
consteval bool lawful() {
  constexpr detail::View view = detail::view_of<Fsm>;
  static_assert(detail::reading_ends_by_proof(view),
                "law 2: a peer may be reading, and nothing proves that it does not after the transition");
  static_assert(detail::proofs_are_of_who_knows(view), "law 2: an event claims to prove what its party cannot know");
  static_assert(detail::reading_begins_by_claim(view), "law 2: a peer may read what it did not claim");
  static_assert(detail::deadlines_have_actors(view),
                "law 3: a state that holds blocks needs a deadline, a duty that the table accepts, and an actor");
  static_assert(detail::deadlines_fence_readers(view),
                "law 3: a deadline takes blocks from a peer that may be reading, without fencing it");
  static_assert(detail::duties_end_everything(view), "law 3: the duties do not bring every handle to an end");
  static_assert(detail::ends_are_reachable(view), "law 5: a state is not reachable, or no end is reachable from it");
  static_assert(detail::ends_hold_nothing(view), "law 5: an end holds blocks, or a state that holds none is no end");
  static_assert(detail::death_ends_everything(view), "law 6: a death does not end what the dead one held");
  static_assert(detail::never_goes_back(view), "an old message could be taken for a new one: the machine goes back");
  return true;
}

}  // namespace tokenrelay::scheduler::handle

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

inline constexpr int rejected = -1;

/// A machine as data, so that a law is one loop: states and events by number, and where each pair leads.
template <std::size_t state_count, std::size_t event_count>
struct View {
  std::array<Named<StateFacts>, state_count> states;
  std::array<Named<EventFacts>, event_count> events;
  std::array<std::array<int, event_count>, state_count> next{};  // or `rejected`
  int initial = 0;

  constexpr View(const std::array<Named<StateFacts>, state_count>& all_states,
                 const std::array<Named<EventFacts>, event_count>& all_events, std::span<const fsm::Row> table,
                 std::string_view first)
      : states(all_states), events(all_events), initial(number_of(states, first)) {
    for (auto& row : next) row.fill(rejected);
    for (const fsm::Row& row : table) {
      if (row.next.empty()) continue;
      next[index(number_of(states, row.state))][index(number_of(events, row.event))] = number_of(states, row.next);
    }
  }

  template <class All>
  [[nodiscard]] static constexpr int number_of(const All& all, std::string_view name) {
    for (std::size_t i = 0; i < all.size(); ++i) {
      if (all[i].name == name) return static_cast<int>(i);
    }
    return rejected;
  }
  [[nodiscard]] static constexpr std::size_t index(int number) { return static_cast<std::size_t>(number); }
  [[nodiscard]] constexpr const StateFacts& state(int number) const { return states[index(number)].facts; }
  [[nodiscard]] constexpr bool holds(int number) const { return state(number).blocks != Party::nobody; }
  [[nodiscard]] constexpr bool leaves(int from) const {
    for (const int to : next[index(from)]) {
      if (to != rejected && to != from) return true;
    }
    return false;
  }
  /// Where the state's duty leads; `rejected` when the table does not accept it.
  [[nodiscard]] constexpr int after_duty(int from) const {
    const int event = number_of(events, state(from).duty);
    return event == rejected ? rejected : next[index(from)][index(event)];
  }
  /// The states that a path leads to, the first one included.
  [[nodiscard]] constexpr std::array<bool, state_count> reached(int from) const {
    std::array<bool, state_count> known{};
    std::array<int, state_count> found{from};
    known[index(from)] = true;
    std::size_t count = 1;
    for (std::size_t i = 0; i < count; ++i) {
      for (const int to : next[index(found[i])]) {
        if (to == rejected || known[index(to)]) continue;
        known[index(to)] = true;
        found[count++] = to;
      }
    }
    return known;
  }
  /// Whether `law(from, to, event)` is true of every transition that changes the state.
  template <class Law>
  [[nodiscard]] constexpr bool every_change(Law law) const {
    for (int from = 0; from < static_cast<int>(state_count); ++from) {
      for (std::size_t event = 0; event < event_count; ++event) {
        const int to = next[index(from)][event];
        if (to != rejected && to != from && !law(from, to, events[event].facts)) return false;
      }
    }
    return true;
  }
  template <class Law>
  [[nodiscard]] constexpr bool every_state(Law law) const {
    for (int number = 0; number < static_cast<int>(state_count); ++number) {
      if (!law(number, state(number))) return false;
    }
    return true;
  }
};

/// Law 2: nobody may be reading after a transition, though somebody may have been before, only with a proof.
constexpr bool reading_ends_by_proof(const auto& fsm) {
  return fsm.every_change([&](int from, int to, const EventFacts& event) {
    return !fsm.state(from).peer_may_touch || fsm.state(to).peer_may_touch || event.proof != Proof::none;
  });
}

/// Law 2: a clock proves nothing, the claimant speaks for itself only, and it is not the claimant that says it is dead.
constexpr bool proofs_are_of_who_knows(const auto& fsm) {
  for (const auto& [name, event] : fsm.events) {
    if (event.guard == Guard::overdue && event.proof != Proof::none) return false;
    if (event.proof == Proof::acknowledged && event.party != Party::claimant) return false;
    if (event.proof == Proof::fenced && (event.guard != Guard::cut_off || event.party != Party::ledger)) return false;
    if (event.proof == Proof::gone && (event.guard != Guard::owner_gone || event.party != Party::ledger)) return false;
  }
  return true;
}

/// Law 2: nobody reads what he did not claim.
constexpr bool reading_begins_by_claim(const auto& fsm) {
  const bool claimed = fsm.every_change([&](int from, int to, const EventFacts& event) {
    return fsm.state(from).peer_may_touch || !fsm.state(to).peer_may_touch || event.party == Party::anyone;
  });
  return claimed && !fsm.state(fsm.initial).peer_may_touch;
}

/// Law 3: whatever holds blocks has a deadline, an act that is due then, and somebody who may do it.
constexpr bool deadlines_have_actors(const auto& fsm) {
  return fsm.every_state([&](int number, const StateFacts& state) {
    const bool holds = fsm.holds(number);
    if (holds != (state.deadline != Deadline::none) || holds != (state.actor != Party::nobody)) return false;
    if (!holds) return true;
    const int next = fsm.after_duty(number);
    if (next == rejected || next == number) return false;
    const int event = fsm.number_of(fsm.events, state.duty);
    const Party party = fsm.events[fsm.index(event)].facts.party;
    return party == state.actor || party == Party::ledger;
  });
}

/// Law 3: where a peer may touch the blocks, what a deadline sets off is the fencing: it ends the claim and keeps the
/// blocks, or it has cut the peer off.
constexpr bool deadlines_fence_readers(const auto& fsm) {
  return fsm.every_state([&](int number, const StateFacts& state) {
    if (!state.peer_may_touch || fsm.state(fsm.after_duty(number)).peer_may_touch) return true;
    return fsm.events[fsm.index(fsm.number_of(fsm.events, state.duty))].facts.proof == Proof::fenced;
  });
}

/// Law 3: when everybody only does what is due, every handle comes to an end.
constexpr bool duties_end_everything(const auto& fsm) {
  return fsm.every_state([&](int number, const StateFacts&) {
    for (std::size_t steps = 0; steps <= fsm.states.size() && fsm.holds(number); ++steps) {
      number = fsm.after_duty(number);
    }
    return !fsm.holds(number);
  });
}

/// Law 5: an end can be reached from everywhere, and every state from the first one.
constexpr bool ends_are_reachable(const auto& fsm) {
  const auto all = fsm.reached(fsm.initial);
  return fsm.every_state([&](int number, const StateFacts&) {
    bool ends = false;
    const auto found = fsm.reached(number);
    for (std::size_t i = 0; i < found.size(); ++i) ends = ends || (found[i] && !fsm.leaves(static_cast<int>(i)));
    return ends && all[fsm.index(number)];
  });
}

/// Law 5: what is over holds nothing, and what holds something is not over.
constexpr bool ends_hold_nothing(const auto& fsm) {
  return fsm.every_state([&](int number, const StateFacts& state) {
    const bool holds = fsm.holds(number);
    return holds == (fsm.leaves(number) && number != fsm.initial) && (holds || !state.peer_may_touch);
  });
}

/// Law 6: a dead owner ends whatever it held, and a dead claimant whatever it claimed.
constexpr bool death_ends_everything(const auto& fsm) {
  return fsm.every_state([&](int number, const StateFacts& state) {
    bool lost = false;
    bool fenced = false;
    for (std::size_t event = 0; event < fsm.events.size(); ++event) {
      if (fsm.next[fsm.index(number)][event] == rejected) continue;
      lost = lost || fsm.events[event].facts.proof == Proof::gone;
      fenced = fenced || fsm.events[event].facts.proof == Proof::fenced;
    }
    return (!fsm.holds(number) || lost) && (!state.peer_may_touch || fenced);
  });
}

/// Old and repeated messages: a state that was left never comes back, so an event that was meant for it is refused.
constexpr bool never_goes_back(const auto& fsm) {
  return fsm.every_change([&](int from, int to, const EventFacts&) { return !fsm.reached(to)[fsm.index(from)]; });
}

template <class Fsm>
inline constexpr auto states_of = facts_of<StateFacts>(typename Fsm::States{});
template <class Fsm>
inline constexpr auto events_of = facts_of<EventFacts>(typename Fsm::Events{});
template <class Fsm>
inline constexpr View view_of(states_of<Fsm>, events_of<Fsm>, Fsm::table, Fsm::initial);

}  // namespace detail

/// True for a machine that satisfies the laws; does not compile for any other.
template <class Fsm>
consteval bool lawful() {
  constexpr const auto& view = detail::view_of<Fsm>;
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

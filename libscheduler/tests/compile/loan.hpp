// A lawful machine in which a peer may read, for the tests of `lawful`: each twin breaks one law.
#pragma once

#include "tokenrelay/scheduler/handle_laws.hpp"

namespace loan {

namespace fsm = tokenrelay::scheduler::fsm;
using namespace tokenrelay::scheduler::handle;

struct Idle {
  static constexpr std::string_view name = "Idle";
  static constexpr StateFacts facts{};
};
struct Kept {
  static constexpr std::string_view name = "Kept";
  static constexpr StateFacts facts{Party::owner, false, Deadline::claim, "Take", Party::owner};
};
struct Read {
  static constexpr std::string_view name = "Read";
  static constexpr StateFacts facts{Party::owner, true, Deadline::answer, "Cut", Party::owner};
};
struct Over {
  static constexpr std::string_view name = "Over";
  static constexpr StateFacts facts{};
};
struct Dead {
  static constexpr std::string_view name = "Dead";
  static constexpr StateFacts facts{};
};

struct Keep {
  static constexpr std::string_view name = "Keep";
  static constexpr EventFacts facts{.party = Party::owner};
};
struct Open {
  static constexpr std::string_view name = "Open";
  static constexpr EventFacts facts{.party = Party::anyone};
};
struct Done {
  static constexpr std::string_view name = "Done";
  static constexpr EventFacts facts{.party = Party::claimant, .proof = Proof::acknowledged};
};
struct Take {
  static constexpr std::string_view name = "Take";
  static constexpr EventFacts facts{.party = Party::owner};
};
struct Tick {
  static constexpr std::string_view name = "Tick";
  static constexpr EventFacts facts{.party = Party::ledger, .guard = Guard::overdue};
};
struct Cut {
  static constexpr std::string_view name = "Cut";
  static constexpr EventFacts facts{.party = Party::ledger, .guard = Guard::cut_off, .proof = Proof::fenced};
};
struct Die {
  static constexpr std::string_view name = "Die";
  static constexpr EventFacts facts{.party = Party::ledger, .guard = Guard::owner_gone, .proof = Proof::gone};
};

inline constexpr std::array rows{
    fsm::to<Idle, Keep, Kept>(), fsm::to<Kept, Open, Read>(), fsm::to<Kept, Take, Over>(), fsm::to<Read, Done, Over>(),
    fsm::to<Read, Cut, Over>(),  fsm::to<Kept, Die, Dead>(),  fsm::to<Read, Die, Dead>(),
};

/// `rows` and one more transition.
template <class State, class Event, class Next>
consteval std::array<fsm::Row, rows.size() + 1> rows_and() {
  std::array<fsm::Row, rows.size() + 1> all{};
  for (std::size_t i = 0; i < rows.size(); ++i) all[i] = rows[i];
  all[rows.size()] = fsm::to<State, Event, Next>();
  return all;
}

template <const auto& transitions, class ReadState = Read, class TickEvent = Tick, class KeptState = Kept>
struct Loan {
  static constexpr std::string_view initial = "Idle";
  using States = fsm::Types<Idle, KeptState, ReadState, Over, Dead>;
  using Events = fsm::Types<Keep, Open, Done, Take, TickEvent, Cut, Die>;
  static constexpr std::span<const fsm::Row> table{transitions};
};
static_assert(lawful<Loan<rows>>());

}  // namespace loan

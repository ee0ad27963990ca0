// Finite state machines that the compiler checks.
//
// A state is a move-only type that holds exactly the resources it owns. A transition is a free function
// `Next on(State&&, Event&&) noexcept`. A machine lists every (state, event) pair once, in a constexpr table:
//
//     inline constexpr std::array door_table{
//         to<Open, Close, Closed>(), reject<Open, Lock>("an open door has no latch"), ...};
//     struct DoorFsm { using States = Types<Open, Closed>; using Events = Types<Close, Lock>;
//                      static constexpr std::string_view name = "door";
//                      static constexpr std::span<const Row> table{door_table}; };
//     static_assert(verified<DoorFsm>());
//
// `verified` does not compile when a pair is missing or listed twice, when the table and the overloads of `on`
// disagree, or when a state can be copied. States live in a std::variant (a slot) and are never named; `dispatch` sends
// an event there.
#pragma once

#include <concepts>
#include <cstddef>
#include <optional>
#include <span>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>

namespace tokenrelay::scheduler::fsm {

template <class... T>
struct Types {};

/// One line of a machine's table: a transition (`next`), or a rejection with its `reason`; the other one is empty.
struct Row {
  std::string_view state;
  std::string_view event;
  std::string_view next;
  std::string_view reason;
};

template <class State, class Event, class Next>
consteval Row to() {
  return {State::name, Event::name, Next::name, {}};
}

template <class State, class Event>
consteval Row reject(std::string_view reason) {
  return {State::name, Event::name, {}, reason};
}

/// What an event gets that arrives in a state that does not take it.
struct Rejected {
  std::string_view reason;
};

template <class T>
concept MoveOnly =
    std::is_nothrow_move_constructible_v<T> && !std::is_copy_constructible_v<T> && !std::is_copy_assignable_v<T>;

template <class State, class Event>
concept Transition = requires(State&& state, Event&& event) { on(std::move(state), std::move(event)); };

template <class State, class Event>
using Next = decltype(on(std::declval<State&&>(), std::declval<Event&&>()));

namespace detail {

/// The last row of a pair, and how often the pair is listed.
struct Listed {
  int times = 0;
  Row row;
};

consteval Listed find(std::span<const Row> table, std::string_view state, std::string_view event) {
  Listed found;
  const Row* const rows = table.data();
  for (std::size_t i = 0; i < table.size(); ++i) {
    if (rows[i].event.size() == event.size() && rows[i].state == state && rows[i].event == event) {
      found.row = rows[i];
      ++found.times;
    }
  }
  return found;
}

/// One evaluation for each pair: compilers limit the steps of a single one.
template <class Fsm, class State, class Event>
inline constexpr Listed listed = find(Fsm::table, State::name, Event::name);

template <class Fsm, class State, class Event>
consteval bool pair_verified() {
  constexpr int times = listed<Fsm, State, Event>.times;
  static_assert(times != 0, "fsm: a (state, event) pair is not listed in the table");
  static_assert(times <= 1, "fsm: a (state, event) pair is listed twice in the table");
  constexpr Row row = listed<Fsm, State, Event>.row;
  if constexpr (!row.next.empty()) {
    static_assert(Transition<State, Event>, "fsm: the table lists a transition that no overload of `on` implements");
    if constexpr (Transition<State, Event>) {
      static_assert(noexcept(on(std::declval<State&&>(), std::declval<Event&&>())),
                    "fsm: a transition must be noexcept");
      static_assert(Next<State, Event>::name == row.next, "fsm: `on` returns another state than the table says");
    }
  } else {
    static_assert(!row.reason.empty(), "fsm: a rejection needs a reason");
    static_assert(!Transition<State, Event>, "fsm: the table rejects a pair that an overload of `on` implements");
  }
  return true;
}

template <class Fsm, class State, class... Event>
consteval bool state_verified(Types<Event...>) {
  static_assert(MoveOnly<State>, "fsm: a state must be move-only");
  return (pair_verified<Fsm, State, Event>() && ...);
}

template <class Fsm, std::size_t pairs>
consteval bool size_verified() {
  static_assert(Fsm::table.size() == pairs, "fsm: the table lists a pair of another machine");
  return true;
}

template <class Fsm, class... State, class... Event>
consteval bool all_verified(Types<State...>, Types<Event...> events) {
  return (state_verified<Fsm, State>(events) && ...) && size_verified<Fsm, sizeof...(State) * sizeof...(Event)>();
}

template <class Types>
struct SlotOf;
template <class... State>
struct SlotOf<Types<State...>> {
  using type = std::variant<State...>;
};

}  // namespace detail

/// True for a machine whose table is complete and agrees with the code; does not compile for any other.
template <class Fsm>
consteval bool verified() {
  return detail::all_verified<Fsm>(typename Fsm::States{}, typename Fsm::Events{});
}

/// Where a state of the machine lives.
template <class Fsm>
using Slot = typename detail::SlotOf<typename Fsm::States>::type;

/// Sends `event` to the state in `slot`: the transition runs, or the table's rejection comes back. Never throws.
template <class Fsm, class Event>
std::optional<Rejected> dispatch(Slot<Fsm>& slot, Event&& event) noexcept {
  static_assert(!std::is_lvalue_reference_v<Event>, "fsm: an event is consumed; pass an rvalue");
  return std::visit(
      [&]<class State>(State& state) -> std::optional<Rejected> {
        if constexpr (Transition<State, Event>) {
          using To = Next<State, Event>;
          if constexpr (std::is_same_v<To, State>) {
            state = on(std::move(state), std::forward<Event>(event));
          } else {
            To next = on(std::move(state), std::forward<Event>(event));
            slot.template emplace<To>(std::move(next));
          }
          return std::nullopt;
        } else {
          constexpr Row row = detail::listed<Fsm, State, Event>.row;
          static_assert(!row.reason.empty(), "fsm: a (state, event) pair is not listed in the table");
          return Rejected{row.reason};
        }
      },
      slot);
}

}  // namespace tokenrelay::scheduler::fsm

// A pair with two answers.
// error: a \(state, event\) pair is listed twice in the table
#include "door.hpp"
namespace door {
inline Closed on(Open&&, Close&&) noexcept { return {}; }
inline constexpr std::array table{
    fsm::to<Open, Close, Closed>(),
#ifdef MUST_NOT_COMPILE
    fsm::reject<Open, Lock>("an open door has no latch"),
    fsm::reject<Open, Lock>("it has no key"),
    fsm::reject<Closed, Close>("it is closed"),
#else
    fsm::reject<Open, Lock>("an open door has no latch"),
    fsm::reject<Closed, Close>("it is closed"),
#endif
    fsm::reject<Closed, Lock>("there is no key"),
};
struct Door {
  using States = fsm::Types<Open, Closed>;
  using Events = fsm::Types<Close, Lock>;
  static constexpr std::span<const fsm::Row> table{door::table};
};
static_assert(fsm::verified<Door>());
}  // namespace door

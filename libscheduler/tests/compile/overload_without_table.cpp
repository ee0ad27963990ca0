// Code does what the table rejects.
// error: the table rejects a pair that an overload
#include "door.hpp"
namespace door {
inline Closed on(Open&&, Close&&) noexcept { return {}; }
#ifdef MUST_NOT_COMPILE
inline Closed on(Open&&, Lock&&) noexcept { return {}; }
#endif
inline constexpr std::array table{
    fsm::to<Open, Close, Closed>(),
#ifdef MUST_NOT_COMPILE
    fsm::reject<Open, Lock>("an open door has no latch"),
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

// A line for a pair that the machine does not have.
// error: the table lists a pair of another machine
#include "door.hpp"
namespace door {
inline Closed on(Open&&, Close&&) noexcept { return {}; }
inline constexpr std::array table{
    fsm::to<Open, Close, Closed>(),
    fsm::reject<Closed, Close>("it is closed"),
#ifdef MUST_NOT_COMPILE
    fsm::reject<Closed, Lock>("there is no key"),
#endif
};
struct Door {
  using States = fsm::Types<Open, Closed>;
  using Events = fsm::Types<Close>;
  static constexpr std::span<const fsm::Row> table{door::table};
};
static_assert(fsm::verified<Door>());
}  // namespace door

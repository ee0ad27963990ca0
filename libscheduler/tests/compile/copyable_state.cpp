// A state that can be copied would own its resources twice.
// error: a state must be move-only
#include "door.hpp"
namespace door {
struct Latch {
  static constexpr std::string_view name = "Latch";
  Latch() = default;
  Latch(Latch&&) noexcept = default;
  Latch& operator=(Latch&&) noexcept = default;
#ifdef MUST_NOT_COMPILE
  Latch(const Latch&) = default;
  Latch& operator=(const Latch&) = default;
#endif
};
inline Latch on(Latch&&, Lock&&) noexcept { return {}; }
inline constexpr std::array table{fsm::to<Latch, Lock, Latch>()};
struct Machine {
  using States = fsm::Types<Latch>;
  using Events = fsm::Types<Lock>;
  static constexpr std::span<const fsm::Row> table{door::table};
};
static_assert(fsm::verified<Machine>());
}  // namespace door

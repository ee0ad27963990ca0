// A machine of two states and two events, for the tests of `verified`.
#pragma once

#include <array>

#include "tokenrelay/scheduler/fsm.hpp"

namespace door {

namespace fsm = tokenrelay::scheduler::fsm;

struct Linear {
  Linear() = default;
  Linear(Linear&&) noexcept = default;
  Linear& operator=(Linear&&) noexcept = default;
};
struct Open : Linear {
  static constexpr std::string_view name = "Open";
};
struct Closed : Linear {
  static constexpr std::string_view name = "Closed";
};
struct Close {
  static constexpr std::string_view name = "Close";
};
struct Lock {
  static constexpr std::string_view name = "Lock";
};

}  // namespace door

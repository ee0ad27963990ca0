// An assertion that stays on in production. A programmer's error ends the process with a message: going on would hand
// one request's KV to another. What an outsider can cause is never asserted; it is answered with a typed value.
//
//     TR_ASSERT(pins > 0, "a pin was given back twice");
#pragma once

namespace tokenrelay::scheduler {

/// Prints `file:line: message (condition)` to stderr and aborts.
[[noreturn]] void assertion_failed(const char* condition, const char* message, const char* file, int line) noexcept;

}  // namespace tokenrelay::scheduler

#define TR_ASSERT(condition, message) \
  (__builtin_expect(!!(condition), 1) \
       ? static_cast<void>(0)         \
       : ::tokenrelay::scheduler::assertion_failed(#condition, message, __FILE__, __LINE__))

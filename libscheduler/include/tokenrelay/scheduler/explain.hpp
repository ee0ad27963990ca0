// What a person is told about one sequence: where it stands, what it waits for, why it was preempted, and what its last
// chunk was bounded by. Computed when somebody asks, from the scheduler's own state: until then it costs nothing but a
// byte or two that are set where something is decided (why.hpp).
//
//     if (auto explanation = scheduler.explanation(id)) std::cout << words_of(*explanation);
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "tokenrelay/scheduler/why.hpp"

namespace tokenrelay::scheduler {

struct Explanation {
  std::uint64_t sequence_id = 0;
  std::string_view state;  // of the request's machine
  Why why = Why::none;     // what was decided about it last

  // Its text.
  int prompt_tokens = 0;
  int output_tokens = 0;
  int output_tokens_max = 0;
  int expected_tokens = 0;  // of output, by its request; 0: it does not say
  int cached_tokens = -1;   // of its prompt, found in the cache at its first admission; -1: it was not admitted yet
  int reused_tokens = 0;    // the same at its last admission
  int computed_tokens = 0;  // whose KV stands, or is being computed by a launched step
  int priority = 0;
  std::int64_t submitted_us = 0;

  // While it waits.
  int ahead = 0;       // that wait too and rank before it: better classes, and earlier ones of its class
  int slots_free = 0;  // of `slots`
  int slots = 0;       //
  int blocks_wanted =
      0;  // for its prompt and expected output, beyond what is cached and in use; at most, before one looked
  int blocks_available = 0;      // free or cached, less the reserve
  int blocks_reserved = 0;       // kept for running sequences to grow
  int overtaken = 0;             // by requests of its class while it was blocked
  int overtaken_max = 0;         // then nobody goes before it
  double tenant_ahead = 0;       // tokens its tenant was served more than the least served one that waits in its class
  double tps_in_force = 0;       // the TPS floor for its user; 0: none
  int tps_floor = 0;             // that its request names; 0: none, it has everybody's
  int users = 0;                 // running sequences
  std::int32_t held_block = -1;  // which another sequence computes
  std::uint64_t held_by = 0;     // that sequence
  int holds = 0;                 // times it waited for one
  int holds_max = 0;             // then it computes its prefix itself

  // While it runs, and what happened to it.
  bool over = false;  // it only waits for launched steps to land
  int slot = -1;
  int steps_in_flight = 0;
  int chunk_tokens = 0;  // its last chunk; 0: none yet
  int drafted = 0;       // tokens of drafts that steps computed
  int accepted = 0;      // of those, that came true
  int preempted = 0;     // times
  Why preempted_why = Why::none;
  std::uint64_t preempted_for = 0;  // the sequence that needed its blocks the last time
};

/// In one line. It begins with the state and a colon.
[[nodiscard]] std::string words_of(const Explanation& explanation);

}  // namespace tokenrelay::scheduler

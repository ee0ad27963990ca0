// A request of the pretend transformer (simulator.hpp), and what it gives when it runs alone.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "tokenrelay/scheduler/types.hpp"

namespace simulation {

using namespace tokenrelay::scheduler;

inline std::uint64_t mix(std::uint64_t a, std::uint64_t b) {
  std::uint64_t x = (a ^ (b + 0x9e3779b97f4a7c15ULL)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 29)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 32);
}

/// A request, and what it gives when it runs alone.
struct Request {
  std::uint64_t id = 0;
  std::vector<TokenId> tokens;  // what is submitted
  int output_start = 0;
  int tokens_max = 1;
  std::vector<TokenId> stops;
  int priority = 0;
  std::vector<std::uint8_t> salt;
  std::vector<std::uint8_t> tenant;
  std::optional<std::uint64_t> parent;  // then the first `inherited` of `tokens` are that sequence's, and are not sent
  std::size_t inherited = 0;

  Handover handover = Handover::none;
  int expected = 0;  // output tokens, as its hint says
  int floor = 0;     // of its own

  std::vector<std::uint64_t> kv;  // expected, by position
  std::vector<TokenId> outputs;   // expected, after those submitted
  Finish finish = Finish::none;

  static constexpr TokenId vocabulary = 64;
  static TokenId sample(std::uint64_t fingerprint) { return static_cast<TokenId>(mix(fingerprint, 1) % vocabulary); }

  void roll_out(int context_tokens) {
    std::uint64_t last = root();
    for (const TokenId token : tokens) kv.push_back(last = mix(last, token));
    const int limit = std::min(output_start + tokens_max, context_tokens);
    for (int length = static_cast<int>(tokens.size()); finish == Finish::none;
         kv.push_back(last = mix(last, outputs.back()))) {
      outputs.push_back(sample(last));
      ++length;
      if (std::find(stops.begin(), stops.end(), outputs.back()) != stops.end()) {
        finish = Finish::stop;
      } else if (length == limit) {
        finish = Finish::length;
      }
    }
    if (handover == Handover::source && outputs.size() > 1) {
      outputs.resize(1);
      finish = Finish::handover;
    }
  }
  /// KV of one tenant is never another's: the pretend transformer sees the salt.
  [[nodiscard]] std::uint64_t root() const {
    std::uint64_t value = 17;
    for (const std::uint8_t byte : salt) value = mix(value, byte);
    return value;
  }
};

}  // namespace simulation

#include "tokenrelay/scheduler/types.hpp"

#include <algorithm>
#include <sstream>

#include "tokenrelay/scheduler/drafts.hpp"

namespace tokenrelay::scheduler {
namespace {

std::optional<std::string> between(const char* name, double value, double minimum, double maximum) {
  if (value >= minimum && value <= maximum) return std::nullopt;  // false for what is not a number
  std::ostringstream text;
  text << name << " is " << value << ", expected " << minimum << " to " << maximum;
  return text.str();
}

std::optional<std::string> bounded(const char* name, int value, int minimum, int maximum) {
  if (value >= minimum && value <= maximum) return std::nullopt;
  return std::string(name) + " is " + std::to_string(value) + ", expected " + std::to_string(minimum) + " to " +
         std::to_string(maximum);
}

}  // namespace

std::optional<std::string> Config::check() const {
  if (block_tokens != 16 && block_tokens != 32 && block_tokens != 64 && block_tokens != 128) {
    return "block_tokens is " + std::to_string(block_tokens) + ", expected 16, 32, 64 or 128";
  }
  if (auto wrong = bounded("blocks", blocks, 1, 1 << 26)) return wrong;
  if (auto wrong = bounded("slots", slots, 1, 1 << 14)) return wrong;
  if (auto wrong = bounded("context_tokens", context_tokens, 2, 1 << 26)) return wrong;
  if (auto wrong = bounded("parts", parts, 1, 64)) return wrong;
  if (blocks % parts != 0) {
    return "blocks is " + std::to_string(blocks) + ", expected a multiple of parts, " + std::to_string(parts);
  }
  if (parts > 1 && host_blocks > 0) return "host_blocks is " + std::to_string(host_blocks) + ", but with parts it is 0";
  if (static_cast<std::int64_t>(blocks / parts) * block_tokens < context_tokens) {
    return "context_tokens is " + std::to_string(context_tokens) + ", but blocks * block_tokens hold only " +
           std::to_string(static_cast<std::int64_t>(blocks / parts) * block_tokens) +
           (parts > 1 ? " in one of the parts" : "");
  }
  if (auto wrong = bounded("step_tokens", step_tokens, slots, 1 << 22)) return wrong;  // each slot may decode one
  if (auto wrong = bounded("chunk_tokens", chunk_tokens, 1, 1 << 22)) return wrong;
  if (auto wrong = bounded("waiting_max", waiting_max, 1, 1 << 20)) return wrong;
  if (auto wrong = bounded("steps_in_flight", steps_in_flight, 1, 16)) return wrong;
  if (auto wrong = bounded("overtakes_max", overtakes_max, 0, 1 << 20)) return wrong;
  if (auto wrong = bounded("class_overtakes_max", class_overtakes_max, 1, 1 << 20)) return wrong;
  if (auto wrong = bounded("preemptions_max", preemptions_max, 1, 1 << 20)) return wrong;
  if (auto wrong = between("tps_floor", tps_floor, 0, 1e5)) return wrong;
  if (auto wrong = between("tps_fraction", tps_fraction, 0.05, 1)) return wrong;
  if (auto wrong = between("prefill_share", prefill_share, 0, 0.9)) return wrong;
  if (auto wrong = bounded("host_blocks", host_blocks, 0, 1 << 26)) return wrong;
  if (auto wrong = bounded("write_backs_max", write_backs_max, 1, 1 << 16)) return wrong;
  if (auto wrong = between("copy_deadline_us", static_cast<double>(copy_deadline_us), 1, 3'600e6)) return wrong;
  if (auto wrong = bounded("draft_tokens", draft_tokens, 0, draft_tokens_max)) return wrong;
  if (auto wrong = bounded("tail_tokens_min", tail_tokens_min, 0, parts > 1 ? 0 : 128)) return wrong;
  return between("floor_wait_us", static_cast<double>(floor_wait_us), 0, 86'400e6);
}

void Plan::reserve(const Config& config) {
  const auto rows = static_cast<std::size_t>(config.slots);
  sequence_ids.reserve(rows);
  slots.reserve(rows);
  starts.reserve(rows);
  lengths.reserve(rows);
  token_ids.reserve(static_cast<std::size_t>(config.step_tokens));
  feedback.reserve(rows);
  samples.reserve(rows);
  admitted_ids.reserve(rows);
  admitted_slots.reserve(rows);
  admitted_cached.reserve(rows);
  admitted_output_start.reserve(rows);
  tail_sources.reserve(rows);
  tail_blocks.reserve(rows);
  tail_tokens.reserve(rows);
}

void Plan::clear() noexcept {
  step = 0;
  decodes = sampled = drafted = 0;
  predicted_us = 0;
  sequence_ids.clear();
  slots.clear();
  starts.clear();
  lengths.clear();
  token_ids.clear();
  feedback.clear();
  samples.clear();
  admitted_ids.clear();
  admitted_slots.clear();
  admitted_cached.clear();
  admitted_output_start.clear();
  tail_sources.clear();
  tail_blocks.clear();
  tail_tokens.clear();
}

void Copies::reserve(std::size_t copies_max) {
  store_ids.reserve(copies_max);
  store_blocks.reserve(copies_max);
  store_slots.reserve(copies_max);
  load_ids.reserve(copies_max);
  load_slots.reserve(copies_max);
  load_blocks.reserve(copies_max);
}

void Copies::clear() noexcept {
  store_ids.clear();
  store_blocks.clear();
  store_slots.clear();
  load_ids.clear();
  load_slots.clear();
  load_blocks.clear();
}

void Outcome::reserve(const Config& config) {
  const auto size = static_cast<std::size_t>(std::min(config.slots * (1 + config.draft_tokens), config.step_tokens));
  sequence_ids.reserve(size);
  token_ids.reserve(size);
  finish.reserve(size);
  rows.reserve(size);
  first.reserve(size);
  cached_tokens.reserve(size);
}

void Outcome::clear() noexcept {
  sequence_ids.clear();
  token_ids.clear();
  finish.clear();
  rows.clear();
  first.clear();
  cached_tokens.clear();
}

}  // namespace tokenrelay::scheduler

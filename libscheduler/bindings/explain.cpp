#include "explain.hpp"

#include <string>

namespace py = pybind11;
namespace ts = tokenrelay::scheduler;

namespace {

std::string name_of(ts::Why why) { return std::string(ts::why_table[static_cast<std::size_t>(why)].name); }

}  // namespace

py::object explanation(const ts::Scheduler& scheduler, std::uint64_t sequence_id) {
  const auto found = scheduler.explanation(sequence_id);
  if (!found) return py::none();
  const ts::Explanation& e = *found;
  py::dict out;
  out["sequence_id"] = e.sequence_id;
  out["text"] = ts::words_of(e);
  out["state"] = std::string(e.state);
  out["why"] = name_of(e.why);
  out["why_words"] = std::string(ts::words_of(e.why));
  out["prompt_tokens"] = e.prompt_tokens;
  out["output_tokens"] = e.output_tokens;
  out["output_tokens_max"] = e.output_tokens_max;
  out["expected_tokens"] = e.expected_tokens;
  out["cached_tokens"] = e.cached_tokens;
  out["reused_tokens"] = e.reused_tokens;
  out["computed_tokens"] = e.computed_tokens;
  out["priority"] = e.priority;
  out["submitted_us"] = e.submitted_us;
  out["ahead"] = e.ahead;
  out["slots_free"] = e.slots_free;
  out["slots"] = e.slots;
  out["blocks_wanted"] = e.blocks_wanted;
  out["blocks_available"] = e.blocks_available;
  out["blocks_reserved"] = e.blocks_reserved;
  out["overtaken"] = e.overtaken;
  out["overtaken_max"] = e.overtaken_max;
  out["tenant_ahead"] = e.tenant_ahead;
  out["tps_in_force"] = e.tps_in_force;
  out["tps_floor"] = e.tps_floor;
  out["users"] = e.users;
  out["held_block"] = e.held_block;
  out["held_by"] = e.held_by;
  out["holds"] = e.holds;
  out["holds_max"] = e.holds_max;
  out["slot"] = e.slot;
  out["steps_in_flight"] = e.steps_in_flight;
  out["chunk_tokens"] = e.chunk_tokens;
  out["drafted"] = e.drafted;
  out["accepted"] = e.accepted;
  out["preempted"] = e.preempted;
  out["preempted_why"] = name_of(e.preempted_why);
  out["preempted_for"] = e.preempted_for;
  return out;
}

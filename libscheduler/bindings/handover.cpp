#include "handover.hpp"

#include <pybind11/native_enum.h>

#include "tokenrelay/scheduler/types.hpp"

namespace py = pybind11;
namespace ts = tokenrelay::scheduler;

void bind_handover(py::module_& m) {
  py::native_enum<ts::Handover>(m, "Handover", "enum.IntEnum", "What becomes of the KV of a prompt.")
      .value("NONE", ts::Handover::none)
      .value("SOURCE", ts::Handover::source)
      .value("DESTINATION", ts::Handover::destination)
      .finalize();
  py::native_enum<ts::HandleEvent>(m, "HandleEvent", "enum.IntEnum", "What happens to a sequence's handle.")
      .value("OFFER", ts::HandleEvent::offer)
      .value("CLAIM", ts::HandleEvent::claim)
      .value("TRANSFER", ts::HandleEvent::transfer)
      .value("ADOPT", ts::HandleEvent::adopt)
      .value("DECLINE", ts::HandleEvent::decline)
      .value("ACKNOWLEDGE", ts::HandleEvent::acknowledge)
      .value("RELEASE", ts::HandleEvent::release)
      .value("QUARANTINE", ts::HandleEvent::quarantine)
      .value("EXPIRE", ts::HandleEvent::expire)
      .value("RECLAIM", ts::HandleEvent::reclaim)
      .value("FENCE", ts::HandleEvent::fence)
      .value("LOSE", ts::HandleEvent::lose)
      .finalize();
  py::native_enum<ts::ImportAnswer>(m, "ImportAnswer", "enum.IntEnum", "What the end of a transfer found.")
      .value("DONE", ts::ImportAnswer::done)
      .value("UNKNOWN", ts::ImportAnswer::unknown)
      .value("NOT_IMPORTING", ts::ImportAnswer::not_importing)
      .value("NOTHING_LEFT", ts::ImportAnswer::nothing_left)
      .finalize();
}

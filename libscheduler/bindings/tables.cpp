#include "tables.hpp"

#include <pybind11/stl.h>

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "tokenrelay/scheduler/block.hpp"
#include "tokenrelay/scheduler/copy.hpp"
#include "tokenrelay/scheduler/handle.hpp"
#include "tokenrelay/scheduler/request_table.hpp"

namespace py = pybind11;
namespace ts = tokenrelay::scheduler;

namespace {

struct PyRow {
  std::string state;
  std::string event;
  std::optional<std::string> next;
  std::string reason;
};

struct PyStateFacts {
  std::string blocks;
  bool peer_may_touch;
  std::string deadline;
  std::optional<std::string> duty;
  std::string actor;
};

struct PyEventFacts {
  std::string party;
  std::string guard;
  std::string proof;
  bool crosses;
};

struct PyTable {
  std::string name;
  std::string initial;
  std::vector<std::string> states;
  std::vector<std::string> events;
  std::vector<PyRow> rows;
  std::map<std::string, PyStateFacts> state_facts;
  std::map<std::string, PyEventFacts> event_facts;
};

std::optional<std::string> text(std::string_view view) {
  return view.empty() ? std::nullopt : std::optional<std::string>(view);
}

template <class... T>
std::vector<std::string> names(ts::fsm::Types<T...>) {
  return {std::string(T::name)...};
}

template <class Fsm>
PyTable table() {
  PyTable out{std::string(Fsm::name),
              std::string(Fsm::initial),
              names(typename Fsm::States{}),
              names(typename Fsm::Events{}),
              {},
              {},
              {}};
  for (const auto& row : Fsm::table) {
    out.rows.push_back({std::string(row.state), std::string(row.event), text(row.next), std::string(row.reason)});
  }
  return out;
}

/// A machine whose states and events have facts (handle_laws.hpp).
template <class Fsm>
PyTable table_with_facts() {
  PyTable out = table<Fsm>();
  for (const auto& [name, facts] : ts::handle::detail::states_of<Fsm>) {
    out.state_facts[std::string(name)] = {std::string(name_of(facts.blocks)), facts.peer_may_touch,
                                          std::string(name_of(facts.deadline)), text(facts.duty),
                                          std::string(name_of(facts.actor))};
  }
  for (const auto& [name, facts] : ts::handle::detail::events_of<Fsm>) {
    out.event_facts[std::string(name)] = {std::string(name_of(facts.party)), std::string(name_of(facts.guard)),
                                          std::string(name_of(facts.proof)), facts.crosses};
  }
  return out;
}

}  // namespace

void bind_tables(py::module_& m) {
  py::class_<PyRow>(m, "Row")
      .def_readonly("state", &PyRow::state)
      .def_readonly("event", &PyRow::event)
      .def_readonly("next", &PyRow::next)
      .def_readonly("reason", &PyRow::reason);
  py::class_<PyStateFacts>(m, "StateFacts")
      .def_readonly("blocks", &PyStateFacts::blocks)
      .def_readonly("peer_may_touch", &PyStateFacts::peer_may_touch)
      .def_readonly("deadline", &PyStateFacts::deadline)
      .def_readonly("duty", &PyStateFacts::duty)
      .def_readonly("actor", &PyStateFacts::actor);
  py::class_<PyEventFacts>(m, "EventFacts")
      .def_readonly("party", &PyEventFacts::party)
      .def_readonly("guard", &PyEventFacts::guard)
      .def_readonly("proof", &PyEventFacts::proof)
      .def_readonly("crosses", &PyEventFacts::crosses);
  py::class_<PyTable>(m, "Table")
      .def_readonly("name", &PyTable::name)
      .def_readonly("initial", &PyTable::initial)
      .def_readonly("states", &PyTable::states)
      .def_readonly("events", &PyTable::events)
      .def_readonly("rows", &PyTable::rows)
      .def_readonly("state_facts", &PyTable::state_facts)
      .def_readonly("event_facts", &PyTable::event_facts);
  m.def("fsm_tables", [] {
    return std::map<std::string, PyTable>{{"block", table<ts::BlockFsm>()},
                                          {"copy", table<ts::CopyFsm>()},
                                          {"host_slot", table<ts::HostSlotFsm>()},
                                          {"kv_handle", table_with_facts<ts::HandleFsm>()},
                                          {"request", table<ts::RequestFsm>()}};
  });
}

#include "memory.hpp"

#include <pybind11/stl.h>

#include <string>

namespace py = pybind11;
namespace ts = tokenrelay::scheduler;

std::vector<ReuseRow> reuse_rows(const ts::Scheduler& scheduler) {
  std::vector<ReuseRow> out;
  for (std::size_t origin = 0; origin < ts::origin_names.size(); ++origin) {
    for (int level = 0; level < ts::reuse_levels; ++level) {
      const auto kind = static_cast<ts::ReuseKind>(static_cast<int>(origin) * ts::reuse_levels + level);
      const auto seen = scheduler.reuse().seen(kind);
      out.push_back({std::string(ts::origin_names[origin]), level, seen.reused, seen.gone, seen.watched});
    }
  }
  return out;
}

void bind_memory(py::module_& m) {
  py::class_<ReuseRow>(m, "ReuseRow")
      .def_readonly("origin", &ReuseRow::origin)
      .def_readonly("level", &ReuseRow::level)
      .def_readonly("reused", &ReuseRow::reused)
      .def_readonly("gone", &ReuseRow::gone)
      .def_readonly("watched", &ReuseRow::watched);
}

#include "tier.hpp"

#include <pybind11/numpy.h>

#include "tokenrelay/scheduler/types.hpp"

namespace py = pybind11;
namespace ts = tokenrelay::scheduler;

namespace {

/// A read-only array that shares the memory of a copy list, which lives as long as the array.
template <class T>
void def_view(py::class_<ts::Copies, std::shared_ptr<ts::Copies>>& type, const char* name,
              std::vector<T> ts::Copies::* member) {
  type.def_property_readonly(name, [member](const py::object& self) {
    const auto& values = self.cast<ts::Copies&>().*member;
    py::array array(py::dtype::of<T>(), {static_cast<py::ssize_t>(values.size())}, {sizeof(T)}, values.data(), self);
    py::detail::array_proxy(array.ptr())->flags &= ~py::detail::npy_api::NPY_ARRAY_WRITEABLE_;
    return array;
  });
}

}  // namespace

void bind_tier(py::module_& m) {
  py::class_<ts::Copies, std::shared_ptr<ts::Copies>> copies(m, "Copies");
  def_view(copies, "store_ids", &ts::Copies::store_ids);
  def_view(copies, "store_blocks", &ts::Copies::store_blocks);
  def_view(copies, "store_slots", &ts::Copies::store_slots);
  def_view(copies, "load_ids", &ts::Copies::load_ids);
  def_view(copies, "load_slots", &ts::Copies::load_slots);
  def_view(copies, "load_blocks", &ts::Copies::load_blocks);
  py::class_<ts::LateCopy>(m, "LateCopy")
      .def_readonly("id", &ts::LateCopy::id)
      .def_readonly("load", &ts::LateCopy::load)
      .def_readonly("block", &ts::LateCopy::block)
      .def_readonly("slot", &ts::LateCopy::slot);
  py::class_<ts::HostCounts>(m, "HostCounts")
      .def_readonly("blocks", &ts::HostCounts::blocks)
      .def_readonly("blocks_used", &ts::HostCounts::blocks_used)
      .def_readonly("write_backs_in_flight", &ts::HostCounts::write_backs_in_flight)
      .def_readonly("loads_in_flight", &ts::HostCounts::loads_in_flight)
      .def_readonly("copies_late", &ts::HostCounts::copies_late)
      .def_readonly("blocks_stored", &ts::HostCounts::blocks_stored)
      .def_readonly("blocks_loaded", &ts::HostCounts::blocks_loaded)
      .def_readonly("loads", &ts::HostCounts::loads)
      .def_readonly("tokens_loaded", &ts::HostCounts::tokens_loaded)
      .def_readonly("copies_failed", &ts::HostCounts::copies_failed)
      .def_readonly("copies_expired", &ts::HostCounts::copies_expired);
}

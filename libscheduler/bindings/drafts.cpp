#include "drafts.hpp"

#include <pybind11/native_enum.h>
#include <pybind11/numpy.h>

#include <algorithm>
#include <array>

#include "tokenrelay/scheduler/ngrams.hpp"
#include "tokenrelay/scheduler/types.hpp"

namespace py = pybind11;
namespace ts = tokenrelay::scheduler;

namespace {

using Tokens = py::array_t<ts::TokenId, py::array::c_style | py::array::forcecast>;

ts::NgramIndex make_index(int order, std::int64_t tokens_max) {
  if (order < 1 || order > ts::NgramIndex::order_max) {
    throw py::value_error("order is " + std::to_string(order) + ", expected 1 to " +
                          std::to_string(ts::NgramIndex::order_max));
  }
  if (tokens_max < ts::NgramIndex::tokens_min || tokens_max > std::int64_t{1} << 30) {
    throw py::value_error("tokens_max is " + std::to_string(tokens_max) + ", expected " +
                          std::to_string(ts::NgramIndex::tokens_min) + " to 2**30");
  }
  return {order, static_cast<std::size_t>(tokens_max)};
}

py::tuple find(const ts::NgramIndex& self, int width) {
  std::array<ts::TokenId, ts::draft_tokens_max> tokens{};
  const auto room = std::span(tokens).first(static_cast<std::size_t>(std::clamp(width, 0, ts::draft_tokens_max)));
  const ts::NgramIndex::Found found = self.find(room);
  return py::make_tuple(py::array_t<ts::TokenId>(static_cast<py::ssize_t>(found.tokens), tokens.data()), found.matched);
}

}  // namespace

void bind_drafts(py::module_& m) {
  py::native_enum<ts::DraftAnswer>(m, "DraftAnswer", "enum.IntEnum", "What a draft found.")
      .value("DRAFTED", ts::DraftAnswer::drafted)
      .value("UNKNOWN", ts::DraftAnswer::unknown)
      .value("NOT_DECODING", ts::DraftAnswer::not_decoding)
      .value("NOTHING_LEFT", ts::DraftAnswer::nothing_left)
      .value("OFF", ts::DraftAnswer::off)
      .finalize();
  py::class_<ts::DraftCounts>(m, "DraftCounts")
      .def_readonly("sequences", &ts::DraftCounts::sequences)
      .def_readonly("drafts", &ts::DraftCounts::drafts)
      .def_readonly("tokens", &ts::DraftCounts::tokens)
      .def_readonly("accepted", &ts::DraftCounts::accepted);
  m.attr("DRAFT_TOKENS_MAX") = ts::draft_tokens_max;
  py::class_<ts::NgramIndex>(m, "NgramIndex")
      .def(py::init(&make_index), py::kw_only(), py::arg("order") = 3, py::arg("tokens_max") = 1 << 17)
      .def(
          "extend",
          [](ts::NgramIndex& self, const Tokens& tokens) {
            self.extend({tokens.data(), static_cast<std::size_t>(tokens.size())});
          },
          py::arg("token_ids"))
      .def(
          "append", [](ts::NgramIndex& self, ts::TokenId token) { self.extend({&token, 1}); }, py::arg("token_id"))
      .def("find", &find, py::arg("width"))
      .def_property_readonly("bytes", &ts::NgramIndex::bytes)
      .def("__len__", &ts::NgramIndex::size);
}

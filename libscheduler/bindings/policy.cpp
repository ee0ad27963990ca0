#include "policy.hpp"

#include <pybind11/native_enum.h>
#include <pybind11/stl.h>

#include "tokenrelay/scheduler/cost_model.hpp"
#include "tokenrelay/scheduler/types.hpp"

namespace py = pybind11;
namespace ts = tokenrelay::scheduler;

namespace {

ts::StepShape shape_of(double prefill_rows, double prefill_tokens, double prefill_pairs, double decode_rows,
                       double decode_context) {
  return {prefill_rows, prefill_tokens, prefill_pairs, decode_rows, decode_context};
}

}  // namespace

void bind_policy(py::module_& m) {
  py::native_enum<ts::Why> why(m, "Why", "enum.IntEnum", "What was decided about a sequence last.");
  for (const auto& entry : ts::why_table) why.value(entry.name.data(), entry.why);
  why.finalize();
  m.def("words_of", &ts::words_of, py::arg("why"));
  py::class_<ts::CostModel>(m, "CostModel")
      .def(py::init<>())
      .def(
          "observe",
          [](ts::CostModel& self, double us, double prefill_rows, double prefill_tokens, double prefill_pairs,
             double decode_rows, double decode_context) {
            self.observe(shape_of(prefill_rows, prefill_tokens, prefill_pairs, decode_rows, decode_context), us);
          },
          py::arg("us"), py::kw_only(), py::arg("prefill_rows") = 0.0, py::arg("prefill_tokens") = 0.0,
          py::arg("prefill_pairs") = 0.0, py::arg("decode_rows") = 0.0, py::arg("decode_context") = 0.0)
      .def(
          "predict_us",
          [](const ts::CostModel& self, double prefill_rows, double prefill_tokens, double prefill_pairs,
             double decode_rows, double decode_context) {
            return self.predict_us(shape_of(prefill_rows, prefill_tokens, prefill_pairs, decode_rows, decode_context));
          },
          py::kw_only(), py::arg("prefill_rows") = 0.0, py::arg("prefill_tokens") = 0.0, py::arg("prefill_pairs") = 0.0,
          py::arg("decode_rows") = 0.0, py::arg("decode_context") = 0.0)
      .def("prefill_us", &ts::CostModel::prefill_us, py::arg("start"), py::arg("length"), py::arg("beside") = 0)
      .def("prefill_tokens_within", &ts::CostModel::prefill_tokens_within, py::arg("start"), py::arg("us"),
           py::arg("most"), py::arg("beside") = 0)
      .def("coefficients",
           [](const ts::CostModel& self) {
             static constexpr const char* names[] = {"step",         "prefill_row", "prefill_token",
                                                     "prefill_pair", "decode_row",  "decode_context_token",
                                                     "beyond_32",    "beyond_128",  "beyond_512"};
             py::dict out;
             const auto values = self.coefficients();
             for (std::size_t i = 0; i < values.size(); ++i) out[names[i]] = values[i];
             return out;
           })
      .def_property_readonly("speed", &ts::CostModel::speed)
      .def_property_readonly("observations", &ts::CostModel::observations);
  py::class_<ts::FloorCounts>(m, "FloorCounts")
      .def_readonly("tps_in_force", &ts::FloorCounts::tps_in_force)
      .def_readonly("tps_batch_1", &ts::FloorCounts::tps_batch_1)
      .def_readonly("users_below", &ts::FloorCounts::users_below)
      .def_readonly("tokens", &ts::FloorCounts::tokens)
      .def_readonly("tokens_late", &ts::FloorCounts::tokens_late)
      .def_readonly("overrides", &ts::FloorCounts::overrides);
  py::class_<ts::Counts>(m, "Counts")
      .def_readonly("blocks_free", &ts::Counts::blocks_free)
      .def_readonly("blocks_cached", &ts::Counts::blocks_cached)
      .def_readonly("blocks_active", &ts::Counts::blocks_active)
      .def_readonly("blocks_writable", &ts::Counts::blocks_writable)
      .def_readonly("blocks_in_flight", &ts::Counts::blocks_in_flight)
      .def_readonly("blocks_quarantined", &ts::Counts::blocks_quarantined)
      .def_readonly("blocks_sealed", &ts::Counts::blocks_sealed)
      .def_readonly("sequences_waiting", &ts::Counts::sequences_waiting)
      .def_readonly("sequences_running", &ts::Counts::sequences_running)
      .def_readonly("steps_in_flight", &ts::Counts::steps_in_flight)
      .def_readonly("sequences_importing", &ts::Counts::sequences_importing)
      .def_readonly("handles_open", &ts::Counts::handles_open)
      .def_readonly("sequences_loading", &ts::Counts::sequences_loading)
      .def_readonly("preemptions", &ts::Counts::preemptions)
      .def_readonly("aborts", &ts::Counts::aborts)
      .def_readonly("prompt_tokens", &ts::Counts::prompt_tokens)
      .def_readonly("cached_tokens", &ts::Counts::cached_tokens)
      .def_readonly("tail_tokens", &ts::Counts::tail_tokens)
      .def_readonly("output_tokens", &ts::Counts::output_tokens)
      .def_readonly("hashed_blocks", &ts::Counts::hashed_blocks)
      .def_readonly("floor", &ts::Counts::floor)
      .def_readonly("host", &ts::Counts::host)
      .def_readonly("drafts", &ts::Counts::drafts);
}

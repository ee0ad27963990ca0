// tokenrelay.kernels._cpu.HostSteps: a plan's rows in, tokens out; see host_step.hpp. kernels/step.py says what is
// what.
#include <pybind11/numpy.h>

#include <array>
#include <stdexcept>

#include "bindings_parts.hpp"
#include "bindings_program.hpp"
#include "host_step.hpp"

namespace py = pybind11;

namespace tokenrelay {
namespace {

using namespace bound;  // NOLINT: the names of this file's arguments

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
const T* data_of(const Array<T>& array, int64_t count, const char* name) {
  if (array.ndim() != 1 || (count >= 0 && array.size() != count)) {
    throw std::invalid_argument(std::string(name) + " has " + std::to_string(array.size()) + " elements, expected " +
                                std::to_string(count));
  }
  return array.data();
}

std::unique_ptr<HostStep> make(const HostSteps& steps, const Array<int32_t>& slots, const Array<int32_t>& starts,
                               const Array<int32_t>& lengths, const Array<uint8_t>& samples,
                               const Array<uint8_t>& feedback, const Array<uint32_t>& token_ids, int64_t decodes) {
  const int64_t rows = slots.size();
  return steps.make({rows, decodes, token_ids.size(), data_of(slots, rows, "slots"), data_of(starts, rows, "starts"),
                     data_of(lengths, rows, "lengths"), data_of(samples, rows, "samples"),
                     data_of(feedback, rows, "feedback"), data_of(token_ids, -1, "token_ids")});
}

py::tuple run(HostSteps& steps, Program& program, int sampler, int64_t vocab, HostStep& step) {
  Array<uint32_t> tokens(step.sampled);
  uint32_t* to = tokens.mutable_data();
  std::vector<int64_t> broken;
  {
    py::gil_scoped_release release;
    steps.run(program, table_of(sampler), vocab, step, to, broken);
  }
  return py::make_tuple(std::move(tokens), broken.empty() ? py::object(py::none()) : py::cast(broken));
}

// A view of a step's memory, which keeps the step.
template <class T>
py::array view(const py::object& self, T* data, int64_t count) {
  return py::array_t<T>(count, data, self);
}

}  // namespace

void bind_step(py::module_& m) {
  py::class_<HostStep>(m, "HostStep")
      .def_readonly("tokens", &HostStep::tokens)
      .def_readonly("rows", &HostStep::rows)
      .def_readonly("decodes", &HostStep::decodes)
      .def_readonly("sampled", &HostStep::sampled)
      .def_readonly("fed", &HostStep::fed)
      .def_readonly("chunk_max", &HostStep::chunk_max)
      .def_readonly("start_min", &HostStep::start_min)
      .def_readonly("context_max", &HostStep::context_max)
      .def_readonly("special", &HostStep::special)
      .def("longs",
           [](const py::object& self) {
             const auto& step = self.cast<const HostStep&>();
             return view(self, step.longs(), step.longs_count());
           })
      .def("ints",
           [](const py::object& self) {
             const auto& step = self.cast<const HostStep&>();
             return view(self, step.ints(), step.ints_count());
           })
      .def("floats", [](const py::object& self) {
        const auto& step = self.cast<const HostStep&>();
        return view(self, step.floats(), step.floats_count());
      });
  // table: address, slots, blocks of each, block_tokens; settings: addresses of temperature, top_p, min_p, top_k,
  // choice, seed, output_start, special
  py::class_<HostSteps>(m, "HostSteps")
      .def(py::init([](const std::tuple<Address, int64_t, int64_t, int64_t>& table,
                       const std::array<Address, 8>& settings, const std::vector<Address>& caches, int64_t blocks,
                       Address last_token) {
        std::vector<const void*> layers;
        layers.reserve(caches.size());
        for (const Address cache : caches) layers.push_back(pointer(cache));
        const auto& [data, slots, blocks_max, block_tokens] = table;
        return std::make_unique<HostSteps>(
            BlockTable{pointer<int32_t>(data), slots, blocks_max, block_tokens},
            SlotSettings{pointer<float>(settings[0]), pointer<float>(settings[1]), pointer<float>(settings[2]),
                         pointer<int32_t>(settings[3]), pointer<int32_t>(settings[4]), pointer<int64_t>(settings[5]),
                         pointer<int64_t>(settings[6]), pointer<uint8_t>(settings[7])},
            StepPlace{std::move(layers), blocks, pointer<int64_t>(last_token)});
      }))
      .def("make", &make)
      .def("run", &run);
}

}  // namespace tokenrelay

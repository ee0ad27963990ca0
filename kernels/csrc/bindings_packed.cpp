// The part of tokenrelay.kernels._cpu that knows packed weights; see bindings.cpp for the conventions.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "bindings_parts.hpp"
#include "packed.hpp"

namespace py = pybind11;

namespace tokenrelay {
namespace {

using Address = uintptr_t;
// (bits, group, columns, depth, data, scales)
using WeightTuple = std::tuple<int, int64_t, int64_t, int64_t, Address, Address>;

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);  // NOLINT(performance-no-int-to-ptr)
}

DType dtype_of(int code) {
  if (code != 0 && code != 1) throw std::invalid_argument("dtype code must be 0 (float32) or 1 (bfloat16)");
  return static_cast<DType>(code);
}

PackedWeights weights_of(const WeightTuple& w) {
  const auto& [bits, group, columns, depth, data, scales] = w;
  return {bits, group, columns, depth, pointer<char>(data), pointer<float>(scales)};
}

}  // namespace

void bind_packed(py::module_& m) {
  m.def("packs", &packs, "Whether this machine has kernels for packed weights of so many bits: 16, 8 or 4.");
  m.def(
      "pack",
      [](const WeightTuple& to, Address rows, Address row_scales) {
        const PackedWeights shape = weights_of(to);
        pack(shape, pointer(rows), pointer<float>(row_scales), pointer(std::get<4>(to)),
             pointer<float>(std::get<5>(to)));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "packed_linear",
      [](int isa, int dtype, int out_dtype, int64_t rows, Address x, int64_t x_stride, const WeightTuple& weights,
         Address bias, Address out) {
        packed_linear(table_of(isa), {dtype_of(dtype), dtype_of(out_dtype), rows, pointer(x), x_stride,
                                      weights_of(weights), pointer(bias), pointer(out)});
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "packed_moe",
      [](int isa, int dtype, int64_t tokens, int64_t top_k, int64_t experts, int64_t d, int64_t f, Address x,
         int64_t x_stride, Address chosen, Address weights, const WeightTuple& gate_up, const WeightTuple& down,
         Address out) {
        packed_moe(table_of(isa),
                   {dtype_of(dtype), tokens, top_k, experts, d, f, pointer(x), x_stride, pointer<int32_t>(chosen),
                    pointer<float>(weights), weights_of(gate_up), weights_of(down), pointer(out)});
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace tokenrelay

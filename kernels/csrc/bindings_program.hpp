// What the files that bind programs and projected attention share: how Python names weights and addresses.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <tuple>

#include "integer.hpp"
#include "packed.hpp"
#include "program.hpp"

namespace tokenrelay::bound {

using Address = uintptr_t;

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);  // NOLINT(performance-no-int-to-ptr)
}

inline DType dtype_of(int code) {
  if (code != 0 && code != 1) throw std::invalid_argument("dtype code must be 0 (float32) or 1 (bfloat16)");
  return static_cast<DType>(code);
}

// (block_table, slots_total, blocks_max, slots, starts, lengths, offsets), as bindings.cpp takes it
using BatchTuple = std::tuple<Address, int64_t, int64_t, Address, Address, Address, Address>;

inline StepRows rows_of(const BatchTuple& batch) {
  const auto& [table, slots_total, blocks_max, slots, starts, lengths, offsets] = batch;
  return {pointer<int32_t>(table),
          slots_total,
          blocks_max,
          pointer<int32_t>(slots),
          pointer<int32_t>(starts),
          pointer<int32_t>(lengths),
          pointer<int32_t>(offsets),
          0,
          0,
          0};
}

// (bits, group, columns, depth, data, scales); bits 0: rows as in a checkpoint, of the program's type
using WeightTuple = std::tuple<int, int64_t, int64_t, int64_t, Address, Address>;
// (the weight's variant, another for its surroundings, packed or not, the weight)
using Matrix = std::tuple<int, int, bool, WeightTuple>;

inline PackedWeights packed_of(const WeightTuple& w) {
  const auto& [bits, group, columns, depth, data, scales] = w;
  return {bits, group, columns, depth, pointer<char>(data), pointer<float>(scales)};
}

inline IntegerWeights integers_of(const WeightTuple& w) {
  const auto& [bits, group, columns, depth, data, scales] = w;
  return {bits, group, columns, depth, pointer<uint8_t>(data), pointer<float>(scales)};
}

inline Side side_of(int code) {
  if (code < 0 || code > 2) throw std::invalid_argument("side must be 0 (both), 1 (keys) or 2 (queries)");
  return static_cast<Side>(code);
}
inline const StepInputs& inputs_of(Step& step, Side side) { return side == Side::queries ? step.sampled() : step.in; }

// Latent attention, routers, experts and sums; see program_layers.hpp.
void bind_program_layers(pybind11::class_<Program>& program);

}  // namespace tokenrelay::bound

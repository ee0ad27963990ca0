// The part of tokenrelay.kernels._cpu.Program that knows latent attention and experts; see program_layers.hpp.
#include <array>

#include "bindings_program.hpp"
#include "program_layers.hpp"

namespace tokenrelay::bound {
namespace {

// variants: of rotation, absorbing, decode, expanding and prefill; shape: heads, nope, rope, rank, value;
// down: its width, and where the key's part to rotate begins; packed: the up-projection (or one of no columns) and the
// matrix that absorbs, and the tokens that are absorbed always; buffers: q, latent, down, q_rope, q_latent, attended,
// out
void add_mla(Program& program, const std::array<int, 5>& variants, int dtype, const std::array<int64_t, 5>& shape,
             bool interleaved, float scale, Address w_uk, Address w_uv, Address cos_sin,
             const std::array<int64_t, 2>& down, int64_t layer,
             const std::tuple<WeightTuple, WeightTuple, int64_t>& packed, int side, const std::array<int, 7>& buffers) {
  const MlaLayer kept{dtype_of(dtype),
                      &table_of(variants[0]),
                      &table_of(variants[1]),
                      &table_of(variants[2]),
                      &table_of(variants[3]),
                      &table_of(variants[4]),
                      shape[0],
                      shape[1],
                      shape[2],
                      shape[3],
                      shape[4],
                      interleaved,
                      scale,
                      pointer(w_uk),
                      pointer(w_uv),
                      pointer<float>(cos_sin),
                      down[0],
                      down[1],
                      layer,
                      {shape[1], shape[4], packed_of(std::get<0>(packed))},
                      packed_of(std::get<1>(packed)),
                      std::get<2>(packed)};
  const Side which = side_of(side);
  program.add([=](Step& step) {
    const auto at = [&](size_t i) { return step.at(buffers[i]); };
    mla_layer(kept, which, inputs_of(step, which), {at(0), at(1), at(2), at(3), at(4), at(5), at(6)});
  });
}

// variants: of the matrix and of routing; counts: experts, top_k, groups, groups_top_k; flags: sigmoid, normalize,
// top2; buffers: x, wide, logits, chosen, weights
void add_route(Program& program, const std::array<int, 2>& variants, int dtype, int64_t d, Address weight, Address bias,
               const std::array<int64_t, 4>& counts, const std::array<bool, 3>& flags, float scale,
               const std::array<int, 5>& buffers) {
  const Route shape{0,        counts[0], counts[1], counts[2], counts[3], nullptr, 0, pointer<float>(bias),
                    flags[0], flags[1],  flags[2],  scale,     nullptr,   nullptr};
  const RouterLayer kept{dtype_of(dtype), &table_of(variants[0]), &table_of(variants[1]), d, pointer(weight), shape};
  program.add([=](Step& step) {
    const auto at = [&](size_t i) { return step.at(buffers[i]); };
    route_rows(kept, step.rows, at(0), at(1), at(2), at(3), at(4));
  });
}

// counts: experts, top_k, d, f; buffers: x, chosen, weights, out
void add_experts(Program& program, int dtype, const Matrix& gate_up, const Matrix& down,
                 const std::array<int64_t, 4>& counts, const std::array<int, 4>& buffers) {
  const auto& [isa, plain, packed, weight] = down;
  const DType type = dtype_of(dtype);
  const auto& up = std::get<3>(gate_up);
  const auto [experts, top_k, d, f] = counts;
  // Of one step, for each of the three kinds of experts.
  const auto fill = [=](Step& step, auto job) {
    job.tokens = step.rows;
    job.x = step.at(buffers[0]);
    job.chosen = reinterpret_cast<const int32_t*>(step.at(buffers[1]));
    job.weights = reinterpret_cast<const float*>(step.at(buffers[2]));
    job.out = step.at(buffers[3]);
    return job;
  };
  if (packed) {
    packed_kernels(packed_of(weight).bits);  // throws where there are none
    const PackedExperts job{type,    0,       top_k,         experts,           d,      f, nullptr, d,
                            nullptr, nullptr, packed_of(up), packed_of(weight), nullptr};
    program.add([=, &table = table_of(isa)](Step& step) { packed_moe(table, fill(step, job)); });
  } else if (std::get<0>(weight) != 0) {
    const IntegerExperts job{
        type, 0, top_k, experts, d, f, nullptr, d, nullptr, nullptr, integers_of(up), integers_of(weight), nullptr};
    program.add([=, &integers = integer_table(isa), &table = table_of(plain)](Step& step) {
      integer_moe(integers, table, fill(step, job));
    });
  } else {
    const Experts job{type,
                      0,
                      top_k,
                      experts,
                      d,
                      f,
                      nullptr,
                      d,
                      nullptr,
                      nullptr,
                      pointer(std::get<4>(up)),
                      pointer(std::get<4>(weight)),
                      nullptr};
    program.add([=, &table = table_of(isa)](Step& step) {
      if (step.rows > 0) moe(table, fill(step, job));
    });
  }
}

void add_sum(Program& program, int isa, int dtype, int64_t width, int a, int b, int out) {
  const DType type = dtype_of(dtype);
  program.add([=, &table = table_of(isa)](Step& step) {
    add_rows(table, type, step.rows, width, step.at(a), step.at(b), step.at(out));
  });
}

}  // namespace

void bind_program_layers(pybind11::class_<Program>& program) {
  program.def("mla", &add_mla).def("route", &add_route).def("experts", &add_experts).def("add", &add_sum);
}

}  // namespace tokenrelay::bound

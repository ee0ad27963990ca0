// tokenrelay.kernels._cpu.Program: a model's step as one call; see program.hpp. kernels/program.py checks what it adds.
#include "bindings_program.hpp"

#include <array>
#include <cstring>

#include "bindings_parts.hpp"
#include "elementwise.hpp"
#include "linear.hpp"

namespace py = pybind11;

namespace tokenrelay {
namespace {

using namespace bound;  // NOLINT: the names of this file's arguments

void add_embed(Program& program, int dtype, int64_t vocab, int64_t d, Address table, int out) {
  const int64_t row = d * size_of(dtype_of(dtype));
  program.add([=](Step& step) {
    for (int64_t t = 0; t < step.in.tokens; ++t) {
      const int64_t token = step.in.token_ids[t];
      if (token < 0 || token >= vocab) {
        throw std::invalid_argument("token id " + std::to_string(token) + " is not in the vocabulary of " +
                                    std::to_string(vocab));
      }
      std::memcpy(step.at(out) + t * row, pointer<char>(table) + token * row, static_cast<size_t>(row));
    }
  });
}

// x: d elements from x_at on of each row of x_width. residual: -1, or the stream that x is added to, in place.
void add_norm(Program& program, int isa, int dtype, int64_t d, int x, int64_t x_at, int64_t x_width, int residual,
              Address weight, float eps, int out) {
  const Table& table = table_of(isa);
  const DType type = dtype_of(dtype);
  program.add([=, &table](Step& step) {
    char* stream = residual < 0 ? nullptr : step.at(residual);
    rms_norm(table, type, step.rows, d, step.at(x) + x_at * size_of(type), x_width, stream, d, pointer(weight), eps,
             step.at(out), stream);
  });
}

void add_linear(Program& program, int dtype, int out_dtype, const Matrix& matrix, int x, Address bias, int out) {
  const auto& [isa, plain, packed, weight] = matrix;
  const DType type = dtype_of(dtype), out_type = dtype_of(out_dtype);
  const int64_t columns = std::get<2>(weight), depth = std::get<3>(weight);
  // Logits that nobody wants to see are not written.
  const auto winners = [=](const Step& step) { return out == kLogits ? step.in.winners : nullptr; };
  if (packed) {
    const PackedWeights kept = packed_of(weight);
    packed_kernels(kept.bits);  // throws where there are none
    program.add([=, &table = table_of(isa)](Step& step) {
      packed_linear(table,
                    {type, out_type, step.rows, step.at(x), depth, kept, pointer(bias), step.at(out), winners(step)});
    });
  } else if (std::get<0>(weight) != 0) {
    const IntegerWeights kept = integers_of(weight);
    program.add([=, &integers = integer_table(isa), &table = table_of(plain)](Step& step) {
      integer_linear(integers, table,
                     {type, out_type, step.rows, step.at(x), depth, kept, pointer(bias), step.at(out), winners(step)});
    });
  } else {
    const Address data = std::get<4>(weight);
    program.add([=, &table = table_of(isa)](Step& step) {
      linear(table, {type, out_type, step.rows, columns, depth, step.at(x), depth, pointer(data), pointer(bias),
                     step.at(out), winners(step)});
    });
  }
}

void add_silu_mul(Program& program, int isa, int dtype, int64_t f, int x, int out) {
  const DType type = dtype_of(dtype);
  program.add([=, &table = table_of(isa)](Step& step) {
    silu_mul(table, type, step.rows, f, step.at(x), 2 * f, step.at(out));
  });
}

// variants: of norm, rotation, decode and prefill
void add_gqa(Program& program, const std::array<int, 4>& variants, int dtype, int64_t heads, int64_t kv_heads,
             int64_t head_dim, Address q_norm, Address k_norm, float eps, float scale, Address cos_sin, int64_t layer,
             int side, int qkv, int q, int out) {
  const GqaLayer kept{dtype_of(dtype),
                      &table_of(variants[0]),
                      &table_of(variants[1]),
                      &table_of(variants[2]),
                      &table_of(variants[3]),
                      heads,
                      kv_heads,
                      head_dim,
                      pointer(q_norm),
                      pointer(k_norm),
                      eps,
                      scale,
                      pointer<float>(cos_sin),
                      layer};
  const Side which = side_of(side);
  program.add(
      [=](Step& step) { gqa_layer(kept, which, inputs_of(step, which), step.at(qkv), step.at(q), step.at(out)); });
}

// After it, only the sampled tokens' rows are worked on. moves: from, to, bytes of a row.
void add_take(Program& program, const std::vector<std::tuple<int, int, int64_t>>& moves) {
  program.add([=](Step& step) {
    for (const auto& [from, to, row_bytes] : moves) {
      for (int64_t s = 0; s < step.in.sampled; ++s) {
        std::memcpy(step.at(to) + s * row_bytes, step.at(from) + step.in.sample_rows[s] * row_bytes,
                    static_cast<size_t>(row_bytes));
      }
    }
    step.rows = step.in.sampled;
  });
}

void run(Program& program, const BatchTuple& batch, int64_t tokens, int64_t rows, int64_t decodes, int64_t sampled,
         Address token_ids, Address positions, Address cache_slots, Address sample_rows,
         const std::vector<Address>& caches, int64_t blocks, int64_t block_tokens, Address logits) {
  std::vector<const void*> layers;
  layers.reserve(caches.size());
  for (const Address cache : caches) layers.push_back(pointer(cache));
  program.run({tokens, rows, decodes, sampled, pointer<int64_t>(token_ids), pointer<int64_t>(positions),
               pointer<int64_t>(cache_slots), pointer<int64_t>(sample_rows), rows_of(batch), layers.data(), blocks,
               block_tokens, pointer<float>(logits)});
}

}  // namespace

void bind_program(py::module_& m) {
  py::class_<Program> program(m, "Program");
  program.def(py::init<int64_t>())
      .def("buffer", &Program::buffer)
      .def("embed", &add_embed)
      .def("norm", &add_norm)
      .def("linear", &add_linear)
      .def("silu_mul", &add_silu_mul)
      .def("gqa", &add_gqa)
      .def("take", &add_take)
      .def("run", &run, py::call_guard<py::gil_scoped_release>());
  bind_program_layers(program);
}

}  // namespace tokenrelay

// Latent attention over packed matrices for Python; see projected.hpp. kernels/cpu/attention.py checks what it passes.
#include "bindings_parts.hpp"
#include "bindings_program.hpp"
#include "heads.hpp"
#include "projected.hpp"

namespace py = pybind11;

namespace tokenrelay {
namespace {

using namespace bound;  // NOLINT: the names of this file's arguments

// (address, token stride, head stride), as bindings.cpp takes it
using Part = std::tuple<Address, int64_t, int64_t>;

// place: the row, and the token that index 0 of queries and out stands for; cache: its address, blocks, block_tokens;
// shape: tokens, heads, nope, rope, value
void attend(int isa, const BatchTuple& batch, const std::array<int64_t, 2>& place,
            const std::tuple<Address, int64_t, int64_t>& cache, const std::array<int64_t, 5>& shape,
            const WeightTuple& up, const Part& q_nope, const Part& q_rope, const Part& out, float scale) {
  const auto [tokens, heads, nope, rope, value] = shape;
  const auto& [data, blocks, block_tokens] = cache;
  const auto& [a, a_token, a_head] = q_nope;
  const auto& [b, b_token, b_head] = q_rope;
  const auto& [to, out_token, out_head] = out;
  const PackedWeights weights = packed_of(up);
  const int64_t width = weights.depth + rope;
  StepRows rows = rows_of(batch);
  rows.token_base = place[1];
  const PagedCache paged{DType::bfloat16, pointer(data), blocks, block_tokens, block_tokens * width, width, 0, 0, 1};
  projected_attention(table_of(isa), rows, place[0], paged,
                      {tokens, heads, pointer(a), pointer(b), nope, rope, a_token, a_head, b_token, b_head},
                      {nope, value, weights}, {pointer(to), value, out_token, out_head}, scale);
}

// shape: tokens, heads, depth, width; first: the column of head 0
void heads(int isa, const std::array<int64_t, 4>& shape, const Part& x, const WeightTuple& weights, int64_t first,
           const Part& out) {
  const auto [tokens, heads, depth, width] = shape;
  const auto& [from, x_token, x_head] = x;
  const auto& [to, out_token, out_head] = out;
  packed_heads(table_of(isa),
               {DType::bfloat16, tokens, heads, depth, width, pointer(from), x_token, x_head, nullptr, pointer(to),
                out_token, out_head},
               packed_of(weights), first);
}

}  // namespace

void bind_projected(py::module_& m) {
  m.def("projected_attention", &attend, py::call_guard<py::gil_scoped_release>());
  m.def("packed_heads", &heads, py::call_guard<py::gil_scoped_release>());
  m.def("costs_less_absorbed", &costs_less_absorbed);
}

}  // namespace tokenrelay

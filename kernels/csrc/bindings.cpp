// tokenrelay.kernels._cpu: the CPU kernels for Python. Addresses are integers (Tensor.data_ptr()), sizes and strides
// are in elements; kernels/cpu/*.py checks types, shapes and contiguity before it calls, what is written in tensors
// (block numbers, slots, positions, token ids) is checked here. Everything runs without the GIL. Bad values:
// ValueError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>

#include "attention.hpp"
#include "bindings_parts.hpp"
#include "cpu.hpp"
#include "elementwise.hpp"
#include "heads.hpp"
#include "integer.hpp"
#include "linear.hpp"
#include "moe.hpp"
#include "pool.hpp"
#include "sampling.hpp"

namespace py = pybind11;
using namespace tokenrelay;  // NOLINT: the one file that binds it

namespace {

using Address = uintptr_t;

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);  // NOLINT(performance-no-int-to-ptr)
}

DType dtype_of(int code) {
  if (code != 0 && code != 1) throw std::invalid_argument("dtype code must be 0 (float32) or 1 (bfloat16)");
  return static_cast<DType>(code);
}

// (block_table, slots_total, blocks_max, slots, starts, lengths, offsets)
using BatchTuple = std::tuple<Address, int64_t, int64_t, Address, Address, Address, Address>;
// (first row, last row, the token that index 0 of q and out stands for)
using Range = std::tuple<int64_t, int64_t, int64_t>;

StepRows step_rows(const BatchTuple& batch, const Range& range) {
  const auto& [table, slots_total, blocks_max, slots, starts, lengths, offsets] = batch;
  const auto& [first, last, token_base] = range;
  return {pointer<int32_t>(table),
          slots_total,
          blocks_max,
          pointer<int32_t>(slots),
          pointer<int32_t>(starts),
          pointer<int32_t>(lengths),
          pointer<int32_t>(offsets),
          first,
          last,
          token_base};
}

// (address, token stride, head stride)
using Part = std::tuple<Address, int64_t, int64_t>;

Queries make_queries(int64_t tokens, int64_t heads, const Part& a, int64_t da, const Part& b, int64_t db) {
  return {tokens, heads,          pointer(std::get<0>(a)), pointer(std::get<0>(b)), da,
          db,     std::get<1>(a), std::get<2>(a),          std::get<1>(b),          std::get<2>(b)};
}

void bind_attention(py::module_& m) {
  m.attr("RUN_TOKENS") = kRunTokens;
  m.def(
      "mla_attention",
      [](int isa, int dtype, const BatchTuple& batch, const Range& range, Address cache, int64_t blocks,
         int64_t block_tokens, int64_t tokens, int64_t heads, int64_t rank, int64_t rope, const Part& q_latent,
         const Part& q_rope, const Part& out, float scale) {
        const int64_t width = rank + rope;
        const PagedCache paged{
            dtype_of(dtype), pointer(cache), blocks, block_tokens, block_tokens * width, width, 0, 0, 1};
        paged_attention(table_of(isa), step_rows(batch, range), paged,
                        make_queries(tokens, heads, q_latent, rank, q_rope, rope),
                        {pointer(std::get<0>(out)), rank, std::get<1>(out), std::get<2>(out)}, scale);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "gqa_attention",
      [](int isa, int dtype, const BatchTuple& batch, const Range& range, Address cache, int64_t blocks,
         int64_t kv_heads, int64_t block_tokens, int64_t tokens, int64_t heads, int64_t head_dim, const Part& q,
         const Part& out, float scale) {
        const int64_t head = block_tokens * head_dim;
        const PagedCache paged{dtype_of(dtype), pointer(cache), blocks,          block_tokens, 2 * kv_heads * head,
                               head_dim,        head,           kv_heads * head, kv_heads};
        paged_attention(table_of(isa), step_rows(batch, range), paged,
                        make_queries(tokens, heads, q, head_dim, Part{0, 0, 0}, 0),
                        {pointer(std::get<0>(out)), head_dim, std::get<1>(out), std::get<2>(out)}, scale);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "dense_attention",
      [](int isa, int dtype, int64_t heads, int64_t q_tokens, int64_t tokens, int64_t first, int64_t q_first,
         const Part& k, const Part& v, Address k2, int64_t k2_token, int64_t dk, int64_t dk2, int64_t dv,
         const Part& q_nope, const Part& q_rope, float scale, Address state_m, Address state_l, Address state_o) {
        const DenseStretch stretch{
            dtype_of(dtype),         heads,          q_tokens, tokens, first, q_first,        pointer(std::get<0>(k)),
            pointer(std::get<0>(v)), pointer(k2),    dk,       dk2,    dv,    std::get<1>(k), std::get<2>(k),
            std::get<1>(v),          std::get<2>(v), k2_token};
        dense_attention(table_of(isa), stretch, make_queries(q_tokens, heads, q_nope, dk, q_rope, dk2), scale,
                        pointer<float>(state_m), pointer<float>(state_l), pointer<float>(state_o));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "head_product",
      [](int isa, int dtype, bool absorbs, int64_t tokens, int64_t heads, int64_t depth, int64_t width, const Part& x,
         Address w, const Part& out) {
        const HeadProduct job{
            dtype_of(dtype),         tokens,          heads,          depth,      width,
            pointer(std::get<0>(x)), std::get<1>(x),  std::get<2>(x), pointer(w), pointer(std::get<0>(out)),
            std::get<1>(out),        std::get<2>(out)};
        (absorbs ? absorb : expand)(table_of(isa), job);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "dense_finish",
      [](int isa, int dtype, int64_t heads, int64_t q_tokens, int64_t dv, Address state_l, Address state_o,
         const Part& out) {
        dense_finish(table_of(isa), dtype_of(dtype), heads, q_tokens, pointer<float>(state_l), pointer<float>(state_o),
                     {pointer(std::get<0>(out)), dv, std::get<1>(out), std::get<2>(out)});
      },
      py::call_guard<py::gil_scoped_release>());
}

void bind_elementwise(py::module_& m) {
  m.def(
      "rms_norm",
      [](int isa, int dtype, int64_t tokens, int64_t d, Address x, int64_t x_stride, Address residual,
         int64_t residual_stride, Address weight, float eps, Address normed, Address total) {
        rms_norm(table_of(isa), dtype_of(dtype), tokens, d, pointer(x), x_stride, pointer(residual), residual_stride,
                 pointer(weight), eps, pointer(normed), pointer(total));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "rotary",
      [](int isa, int dtype, int64_t tokens, int64_t heads, int64_t r, const Part& x, Address positions,
         Address cos_sin, int64_t table_rows, bool interleaved, Address out) {
        rotary(table_of(isa), dtype_of(dtype), tokens, heads, r, pointer(std::get<0>(x)), std::get<1>(x),
               std::get<2>(x), pointer<int64_t>(positions), pointer<float>(cos_sin), table_rows, interleaved,
               pointer(out));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "silu_mul",
      [](int isa, int dtype, int64_t tokens, int64_t f, Address gate_up, int64_t stride, Address out) {
        silu_mul(table_of(isa), dtype_of(dtype), tokens, f, pointer(gate_up), stride, pointer(out));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "mla_cache_write",
      [](int dtype, int64_t tokens, int64_t rank, int64_t rope, Address latent, int64_t latent_stride, Address k_rope,
         int64_t k_rope_stride, Address cache, int64_t blocks, int64_t block_tokens, Address cache_slots) {
        const int64_t size = size_of(dtype_of(dtype)), row = (rank + rope) * size;
        CacheWrite write{pointer(latent),
                         latent_stride * size,
                         0,
                         tokens,
                         1,
                         rank * size,
                         pointer(cache),
                         blocks,
                         block_tokens,
                         block_tokens * row,
                         row,
                         0,
                         pointer<int64_t>(cache_slots)};
        cache_write(write);
        write.from = pointer(k_rope);
        write.token_stride = k_rope_stride * size;
        write.bytes = rope * size;
        write.cache = pointer<char>(cache) + rank * size;
        cache_write(write);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "gqa_cache_write",
      [](int dtype, int64_t tokens, int64_t kv_heads, int64_t head_dim, const Part& k, const Part& v, Address cache,
         int64_t blocks, int64_t block_tokens, Address cache_slots) {
        const int64_t size = size_of(dtype_of(dtype)), row = head_dim * size, head = block_tokens * row;
        const auto write = [&](const Part& from, int64_t shift) {
          cache_write({pointer(std::get<0>(from)), std::get<1>(from) * size, std::get<2>(from) * size, tokens, kv_heads,
                       row, pointer<char>(cache) + shift, blocks, block_tokens, 2 * kv_heads * head, row, head,
                       pointer<int64_t>(cache_slots)});
        };
        write(k, 0);
        write(v, kv_heads * head);
      },
      py::call_guard<py::gil_scoped_release>());
}

void bind_moe(py::module_& m) {
  m.def(
      "linear",
      [](int isa, int dtype, int out_dtype, int64_t rows, int64_t columns, int64_t depth, Address x, int64_t x_stride,
         Address weight, Address bias, Address out) {
        linear(table_of(isa), {dtype_of(dtype), dtype_of(out_dtype), rows, columns, depth, pointer(x), x_stride,
                               pointer(weight), pointer(bias), pointer(out)});
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "integer_linear",
      [](int isa, int plain_isa, int dtype, int out_dtype, int bits, int64_t group, int64_t rows, int64_t columns,
         int64_t depth, Address x, int64_t x_stride, Address data, Address scales, Address bias, Address out) {
        integer_linear(integer_table(isa), table_of(plain_isa),
                       {dtype_of(dtype),
                        dtype_of(out_dtype),
                        rows,
                        pointer(x),
                        x_stride,
                        {bits, group, columns, depth, pointer<uint8_t>(data), pointer<float>(scales)},
                        pointer(bias),
                        pointer(out)});
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "integer_fit",
      [](int isa, int dtype, int bits, int64_t group, int64_t rows, int64_t width, Address matrix, Address data,
         Address scales) {
        integer_fit(integer_table(isa), dtype_of(dtype), pointer(matrix), {bits, group, rows, width, nullptr, nullptr},
                    pointer<uint8_t>(data), pointer<float>(scales));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "integer_moe",
      [](int isa, int plain_isa, int dtype, int bits, int64_t gate_up_group, int64_t down_group, int64_t tokens,
         int64_t top_k, int64_t experts, int64_t d, int64_t f, Address x, int64_t x_stride, Address chosen,
         Address weights, const std::pair<Address, Address>& gate_up, const std::pair<Address, Address>& down,
         Address out) {
        integer_moe(
            integer_table(isa), table_of(plain_isa),
            {dtype_of(dtype),
             tokens,
             top_k,
             experts,
             d,
             f,
             pointer(x),
             x_stride,
             pointer<int32_t>(chosen),
             pointer<float>(weights),
             {bits, gate_up_group, experts * 2 * f, d, pointer<uint8_t>(gate_up.first), pointer<float>(gate_up.second)},
             {bits, down_group, experts * d, f, pointer<uint8_t>(down.first), pointer<float>(down.second)},
             pointer(out)});
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "moe",
      [](int isa, int dtype, int64_t tokens, int64_t top_k, int64_t experts, int64_t d, int64_t f, Address x,
         int64_t x_stride, Address chosen, Address weights, Address gate_up, Address down, Address out) {
        moe(table_of(isa),
            {dtype_of(dtype), tokens, top_k, experts, d, f, pointer(x), x_stride, pointer<int32_t>(chosen),
             pointer<float>(weights), pointer(gate_up), pointer(down), pointer(out)});
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "moe_route",
      [](int isa, int64_t tokens, int64_t experts, Address logits, int64_t stride, Address bias, int64_t top_k,
         int64_t groups, int64_t groups_top_k, bool sigmoid, bool normalize, bool top2, float scale, Address chosen,
         Address weights) {
        moe_route(table_of(isa),
                  {tokens, experts, top_k, groups, groups_top_k, pointer<float>(logits), stride, pointer<float>(bias),
                   sigmoid, normalize, top2, scale, pointer<int32_t>(chosen), pointer<float>(weights)});
      },
      py::call_guard<py::gil_scoped_release>());
}

void bind_sampling(py::module_& m) {
  // The weights that `sample` draws by, for tests: they must be the reference's bit for bit.
  m.def(
      "token_weights",
      [](int isa, int64_t vocab, Address logits, float temperature, Address weights) {
        const Table& table = table_of(isa);
        const float max = table.max_logit(pointer<float>(logits), vocab);
        return table.token_weights(pointer<float>(logits), vocab, max, 1.0 / static_cast<double>(temperature),
                                   pointer<int64_t>(weights));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "sample",
      [](int isa, int64_t rows, int64_t vocab, Address logits, int64_t stride, Address temperature, Address top_p,
         Address top_k, Address min_p, Address seed, Address choice, Address position, Address tokens) {
        sample(table_of(isa),
               {rows, vocab, pointer<float>(logits), stride, pointer<float>(temperature), pointer<float>(top_p),
                pointer<float>(min_p), pointer<int32_t>(top_k), pointer<int64_t>(seed), pointer<int32_t>(choice),
                pointer<int64_t>(position), pointer<int64_t>(tokens)});
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "token_logprobs",
      [](int isa, int64_t rows, int64_t vocab, int64_t top_k, Address logits, int64_t stride, Address tokens,
         Address chosen, Address top, Address top_tokens) {
        token_logprobs(table_of(isa), {rows, vocab, top_k, pointer<float>(logits), stride, pointer<int64_t>(tokens),
                                       pointer<float>(chosen), pointer<float>(top), pointer<int64_t>(top_tokens)});
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "finite_rows",
      [](int64_t rows, int64_t vocab, Address logits, int64_t stride, Address finite) {
        finite_rows(rows, vocab, pointer<float>(logits), stride, pointer<uint8_t>(finite));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "apply_penalties",
      [](int64_t rows, int64_t vocab, Address logits, int64_t stride, int64_t count, Address row, Address presence,
         Address frequency, Address repetition, Address offsets, Address tokens, int64_t seen_total,
         Address output_counts, Address bias_offsets, Address bias_tokens, int64_t bias_total, Address bias) {
        apply_penalties({rows, vocab, count, seen_total, bias_total, pointer<float>(logits), stride,
                         pointer<int64_t>(row), pointer<float>(presence), pointer<float>(frequency),
                         pointer<float>(repetition), pointer<int64_t>(offsets), pointer<int64_t>(tokens),
                         pointer<int32_t>(output_counts), pointer<int64_t>(bias_offsets), pointer<int64_t>(bias_tokens),
                         pointer<float>(bias)});
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels; see kernels/csrc.";
  m.def("isa_features", &isa_features, "Instruction sets of this machine, by Linux's names.");
  m.def(
      "isa_runs",
      [](int isa) { return isa >= 0 && isa <= static_cast<int>(Isa::avx512bf16) && isa_runs(static_cast<Isa>(isa)); },
      "Whether this machine can run a variant: 0 baseline, 1 AVX2, 2 AVX-512, 3 AVX-512 with BF16.");
  m.def("processors", &processors, "Processors this process may use.");
  m.def("threads", &threads, "Threads that work on a call.");
  m.def("set_threads", &set_threads, py::call_guard<py::gil_scoped_release>(), "Change that; 1 to 256.");
  bind_attention(m);
  bind_elementwise(m);
  bind_moe(m);
  bind_packed(m);
  bind_program(m);
  bind_projected(m);
  bind_sampling(m);
  bind_step(m);
}

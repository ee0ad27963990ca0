#include "program.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "pool.hpp"

namespace tokenrelay {
namespace {

constexpr int64_t kTaskElements = 32768;  // less than this is not worth waking a thread for

enum Use { kHead };

void refuse(const std::string& what) { throw std::invalid_argument(what); }

}  // namespace

Program::~Program() { std::free(memory_); }

int Program::buffer(int64_t bytes) {
  widths_.push_back(bytes);
  return static_cast<int>(widths_.size()) - 1;
}

void Program::check(const StepInputs& in) const {
  for (int64_t t = 0; t < in.tokens; ++t) {
    if (in.positions[t] < 0 || in.positions[t] >= positions_max_) {
      refuse("position " + std::to_string(in.positions[t]) + " of token " + std::to_string(t) +
             " is outside the table of " + std::to_string(positions_max_) + " positions");
    }
    if (in.cache_slots[t] >= in.blocks * in.block_tokens) {
      refuse("cache_slots[" + std::to_string(t) + "] is " + std::to_string(in.cache_slots[t]) + ", the cache has " +
             std::to_string(in.blocks * in.block_tokens));
    }
  }
  for (int64_t s = 0; s < in.sampled; ++s) {
    if (in.sample_rows[s] < 0 || in.sample_rows[s] >= in.tokens) {
      refuse("sample_rows[" + std::to_string(s) + "] is " + std::to_string(in.sample_rows[s]) + ", the step has " +
             std::to_string(in.tokens) + " tokens");
    }
  }
}

void Program::run(const StepInputs& inputs) {
  check(inputs);
  std::lock_guard lock(mutex_);
  const int64_t rows = max_of(inputs.tokens, inputs.sampled);
  std::vector<int64_t> offsets;
  int64_t total = 0;
  for (const int64_t width : widths_) {
    offsets.push_back(total);
    total += ceil_div(rows * width, 64) * 64;
  }
  if (total > bytes_) {
    std::free(memory_);
    bytes_ = 0;
    memory_ = static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(total)));
    if (memory_ == nullptr) throw std::bad_alloc();
    bytes_ = total;
  }
  std::vector<char*> buffers;
  for (const int64_t offset : offsets) buffers.push_back(memory_ + offset);
  Step step(inputs, std::move(buffers));
  for (const auto& operation : operations_) operation(step);
}

const StepInputs& Step::sampled() {
  if (sampled_ != nullptr) return *sampled_;
  sampled_ = std::make_unique<StepInputs>(in);
  StepInputs& to = *sampled_;
  const auto count = static_cast<size_t>(in.sampled);
  positions_.resize(count);
  ints_.assign(4 * count + 1, 1);
  int32_t *slots = ints_.data(), *starts = slots + count, *lengths = starts + count, *offsets = lengths + count;
  to.decodes = 0;
  for (size_t i = 0; i < count; ++i) {
    const int64_t token = in.sample_rows[i];
    const int32_t* ends = in.batch.offsets + 1;
    const auto row = std::upper_bound(ends, ends + in.rows, token) - ends;
    positions_[i] = in.positions[token];
    slots[i] = in.batch.slots[row];
    starts[i] = static_cast<int32_t>(in.positions[token]);
    offsets[i] = static_cast<int32_t>(i);
    if (row < in.decodes && to.decodes == static_cast<int64_t>(i)) ++to.decodes;
  }
  offsets[count] = static_cast<int32_t>(count);
  to.tokens = to.rows = in.sampled;
  to.positions = positions_.data();
  to.batch.slots = slots;
  to.batch.starts = starts;
  to.batch.lengths = lengths;
  to.batch.offsets = offsets;
  return to;
}

void gqa_layer(const GqaLayer& l, Side side, const StepInputs& in, const char* qkv, char* q, char* out) {
  const int64_t size = size_of(l.dtype), head_bytes = l.head_dim * size;
  const int64_t all = (l.heads + 2 * l.kv_heads) * head_bytes, block = 2 * l.kv_heads * in.block_tokens * head_bytes;
  char* cache = static_cast<char*>(const_cast<void*>(in.caches[l.layer]));
  const auto turn = [&](const char* from, const void* norm, const float* cos_sin, char* to) {
    if (norm != nullptr) {
      char* normed = static_cast<char*>(scratch(kHead, head_bytes));
      l.norm->rms_norm(l.dtype, l.head_dim, from, nullptr, norm, l.eps, normed, nullptr);
      from = normed;
    }
    l.rotate->rotary(l.dtype, l.head_dim, from, cos_sin, false, to);
  };
  const int64_t step = max_of(1, kTaskElements / (all / size));
  parallel_for(ceil_div(in.tokens, step), [&](int64_t task) {
    for (int64_t t = task * step; t < min_of(in.tokens, (task + 1) * step); ++t) {
      const char* token = qkv + t * all;
      const float* cos_sin = l.cos_sin + in.positions[t] * l.head_dim;
      for (int64_t h = 0; side != Side::keys && h < l.heads; ++h) {
        turn(token + h * head_bytes, l.q_norm, cos_sin, q + (t * l.heads + h) * head_bytes);
      }
      const int64_t slot = side == Side::queries ? -1 : in.cache_slots[t];
      if (slot < 0) continue;
      char* entry = cache + slot / in.block_tokens * block + slot % in.block_tokens * head_bytes;
      for (int64_t h = 0; h < l.kv_heads; ++h) {
        char* key = entry + h * in.block_tokens * head_bytes;
        turn(token + (l.heads + h) * head_bytes, l.k_norm, cos_sin, key);
        std::memcpy(key + l.kv_heads * in.block_tokens * head_bytes, token + (l.heads + l.kv_heads + h) * head_bytes,
                    static_cast<size_t>(head_bytes));
      }
    }
  });
  if (side == Side::keys) return;
  const int64_t head = in.block_tokens * l.head_dim;
  const PagedCache paged{l.dtype,    cache, in.blocks,         in.block_tokens, 2 * l.kv_heads * head,
                         l.head_dim, head,  l.kv_heads * head, l.kv_heads};
  const auto attend = [&](const Table& table, int64_t first, int64_t last, int64_t token, int64_t tokens) {
    if (first == last) return;
    StepRows rows = in.batch;
    rows.first = first;
    rows.last = last;
    rows.token_base = token;
    const int64_t stride = l.heads * l.head_dim, shift = token * stride * size;
    const Queries queries{tokens, l.heads, q + shift, nullptr, l.head_dim, 0, stride, l.head_dim, 0, 0};
    paged_attention(table, rows, paged, queries, {out + shift, l.head_dim, stride, l.head_dim}, l.scale);
  };
  attend(*l.decode, 0, in.decodes, 0, in.decodes);
  attend(*l.prefill, in.decodes, in.rows, in.decodes, in.tokens - in.decodes);
}

}  // namespace tokenrelay

// A model's step as one call: the operations of all layers, captured once, run one after the other without Python.
//
//   Program program(DType::bfloat16);
//   const int x = program.buffer(d), y = program.buffer(n);
//   program.add([=](Step& step) { ... step.at(x) ... });      // what bindings_program.cpp does for each operation
//   program.run(inputs);
//
// Operations call the same functions as the single kernels, so a program's results are theirs bit by bit.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "attention.hpp"
#include "packed.hpp"

namespace tokenrelay {

// Addresses of one step's tensors (kernels/batch.py); t tokens, n rows, s sampled ones.
struct StepInputs {
  int64_t tokens, rows, decodes, sampled;
  const int64_t* token_ids;    // [t]
  const int64_t* positions;    // [t]
  const int64_t* cache_slots;  // [t]
  const int64_t* sample_rows;  // [s]
  StepRows batch;              // its range is set by the operations
  const void* const* caches;   // [layers]
  int64_t blocks, block_tokens;
  float* logits;              // [s, vocab]
  Winner* winners = nullptr;  // [s]: who has the largest logit, in their place
};

class Step {
 public:
  Step(const StepInputs& inputs, std::vector<char*> buffers)
      : in(inputs), rows(inputs.tokens), buffers_(std::move(buffers)) {}

  // The sampled tokens as a step of their own: rows of one token each, in their order.
  const StepInputs& sampled();

  char* at(int buffer) const {
    return buffer < 0 ? reinterpret_cast<char*>(in.logits) : buffers_[static_cast<size_t>(buffer)];
  }

  const StepInputs& in;
  int64_t rows;  // tokens that operations work on: all, then the sampled ones

 private:
  const std::vector<char*> buffers_;
  std::unique_ptr<StepInputs> sampled_;  // once it was asked for
  std::vector<int64_t> positions_;
  std::vector<int32_t> ints_;
};

// What an operation of attention does: all of it, or, of the last layer, keys and values for all tokens first, then
// queries and attention for those that are sampled.
enum class Side { both, keys, queries };

constexpr int kLogits = -1;  // the buffer that the caller brings

class Program {
 public:
  explicit Program(int64_t positions_max) : positions_max_(positions_max) {}
  ~Program();
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  // A buffer of `bytes` for each token. Its number is the argument of Step::at.
  int buffer(int64_t bytes);
  void add(std::function<void(Step&)> operation) { operations_.push_back(std::move(operation)); }
  // Throws std::invalid_argument for positions, slots or rows out of range, before anything is written. One at a time:
  // a second caller waits.
  void run(const StepInputs& inputs);

 private:
  void check(const StepInputs& inputs) const;

  const int64_t positions_max_;
  std::vector<int64_t> widths_;  // of the buffers, in bytes
  std::vector<std::function<void(Step&)>> operations_;
  std::mutex mutex_;
  char* memory_ = nullptr;  // of all buffers; it grows
  int64_t bytes_ = 0;
};

// One layer of grouped-query attention after its projections: norm and rotation of queries and keys, the cache's new
// entries, attention.
struct GqaLayer {
  DType dtype;
  const Table *norm, *rotate, *decode, *prefill;  // each as the registry chose it
  int64_t heads, kv_heads, head_dim;
  const void *q_norm, *k_norm;  // [head_dim] or null
  float eps, scale;
  const float* cos_sin;  // [positions, head_dim]
  int64_t layer;
};
// qkv [t, (heads + 2 kv_heads) * head_dim] -> out [t, heads * head_dim]; q is room for as much.
void gqa_layer(const GqaLayer& layer, Side side, const StepInputs& in, const char* qkv, char* q, char* out);

}  // namespace tokenrelay

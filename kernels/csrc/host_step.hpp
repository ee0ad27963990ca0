// A step's inputs made from a plan's rows, and a step run from feedback to tokens: one call each, no Python between.
//
//   HostSteps steps(table, settings, place);             // addresses that stay
//   const auto step = steps.make(rows);                  // kernels/batch.py says what the arrays are
//   steps.run(program, *step, tokens, broken);           // the model, and the choice of tokens
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "program.hpp"
#include "sampling.hpp"
#include "winners.hpp"

namespace tokenrelay {

// A plan's rows (libscheduler), n of t tokens. Decode rows come first; one with a draft has more than one token.
struct PlanRows {
  int64_t rows, decodes, tokens;
  const int32_t *slots, *starts, *lengths;  // [n]
  const uint8_t *samples, *feedback;        // [n]
  const uint32_t* token_ids;                // [t]
};

// The scheduler's block table, which changes from plan to plan.
struct BlockTable {
  const int32_t* blocks;  // [slots, blocks_max]
  int64_t slots, blocks_max, block_tokens;
};

// What each slot's sequence asks of sampling, [slots].
struct SlotSettings {
  const float *temperature, *top_p, *min_p;
  const int32_t *top_k, *choice;
  const int64_t *seed, *output_start;
  const uint8_t* special;  // asks for more than a token
};

// One step, in memory of its own: t tokens of n rows, s of them sampled, f fed with what their slot sampled last.
struct HostStep {
  int64_t tokens = 0, rows = 0, decodes = 0, sampled = 0, fed = 0;
  int64_t chunk_max = 0;    // tokens of the longest row that is no decode
  int64_t start_min = 0;    // where such rows begin, the earliest of them
  int64_t context_max = 0;  // tokens of the longest context, this step's included
  bool special = false;     // a sampled row asks for more than a token

  // int64: token_ids, positions, cache_slots [t]; sample_rows, sample_slots, sample_ends, output positions, seeds [s];
  // fed_at, fed_slots [f].
  int64_t* longs() const { return memory.get(); }
  int64_t longs_count() const { return 3 * tokens + 5 * sampled + 2 * fed; }
  // int32: slots, starts, lengths [n], offsets [n + 1], top_k, choices [s].
  int32_t* ints() const { return reinterpret_cast<int32_t*>(longs() + longs_count()); }
  int64_t ints_count() const { return 4 * rows + 1 + 2 * sampled; }
  // float: temperature, top_p, min_p [s].
  float* floats() const { return reinterpret_cast<float*>(ints() + ints_count()); }
  int64_t floats_count() const { return 3 * sampled; }

  std::unique_ptr<int64_t[]> memory;
};

// Where steps run: the caches, and the token that each slot sampled last.
struct StepPlace {
  std::vector<const void*> caches;  // by layer
  int64_t blocks;                   // of each
  int64_t* last_token;              // [slots]
};

class HostSteps {
 public:
  HostSteps(const BlockTable& table, const SlotSettings& settings, StepPlace place)
      : table_(table), settings_(settings), place_(std::move(place)) {}

  // Drafted rows are cut into rows of one token. Throws std::invalid_argument for rows outside the table.
  std::unique_ptr<HostStep> make(const PlanRows& rows) const;

  // Runs the model and chooses a token for each sampled row -> tokens [s]; `broken`: rows whose logits are no numbers,
  // whose tokens mean nothing. One at a time.
  void run(Program& program, const Table& sampler, int64_t vocab, HostStep& step, uint32_t* tokens,
           std::vector<int64_t>& broken);

 private:
  const BlockTable table_;
  const SlotSettings settings_;
  const StepPlace place_;
  std::vector<Winner> winners_;  // where all rows are greedy
  std::vector<float> logits_;    // else
  std::vector<int64_t> chosen_;
  std::vector<uint8_t> finite_;
};

}  // namespace tokenrelay

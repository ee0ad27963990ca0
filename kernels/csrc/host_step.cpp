#include "host_step.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace tokenrelay {
namespace {

void refuse(const std::string& what) { throw std::invalid_argument(what); }
void refuse(int64_t row, const std::string& what) { refuse("row " + std::to_string(row) + ": " + what); }

// The number of rows after drafts are cut, with everything that a step's size needs. Refuses what lies outside.
HostStep measured(const PlanRows& in, const BlockTable& table, const SlotSettings& settings) {
  HostStep step;
  if (in.decodes < 0 || in.decodes > in.rows) refuse("decodes is not a number of the rows");
  for (int64_t row = 0; row < in.rows; ++row) {
    const int64_t slot = in.slots[row], length = in.lengths[row], end = in.starts[row] + length;
    if (slot < 0 || slot >= table.slots) refuse(row, "slot " + std::to_string(slot) + " is not in block_table");
    if (in.starts[row] < 0 || length < 1) refuse(row, "negative start, or no tokens");
    if (ceil_div(end, table.block_tokens) > table.blocks_max) {
      refuse(row, "its context is longer than block_table is wide");
    }
    const bool decodes = row < in.decodes;
    const int64_t cut = decodes ? length : 1;
    step.tokens += length;
    step.rows += cut;
    if (decodes) step.decodes += cut;
    if (!decodes) {
      step.start_min = step.chunk_max == 0 ? in.starts[row] : min_of(step.start_min, in.starts[row]);
      step.chunk_max = max_of(step.chunk_max, length);
    }
    step.context_max = max_of(step.context_max, end);
    if (in.samples[row] != 0) {
      step.sampled += cut;
      step.special = step.special || settings.special[slot] != 0;
    }
    if (in.feedback[row] != 0) step.fed += cut;
  }
  if (step.tokens != in.tokens) {
    refuse("token_ids has " + std::to_string(in.tokens) + " tokens, the rows have " + std::to_string(step.tokens));
  }
  return step;
}

}  // namespace

std::unique_ptr<HostStep> HostSteps::make(const PlanRows& in) const {
  auto step = std::make_unique<HostStep>(measured(in, table_, settings_));
  const int64_t t = step->tokens, n = step->rows, s = step->sampled, f = step->fed;
  const int64_t bytes = step->longs_count() * 8 + step->ints_count() * 4 + step->floats_count() * 4;
  step->memory.reset(new int64_t[static_cast<size_t>(ceil_div(bytes, 8))]);
  int64_t *token_ids = step->longs(), *positions = token_ids + t, *cache_slots = positions + t;
  int64_t *sample_rows = cache_slots + t, *sample_slots = sample_rows + s, *sample_ends = sample_slots + s;
  int64_t *places = sample_ends + s, *seeds = places + s, *fed_at = seeds + s, *fed_slots = fed_at + f;
  int32_t *slots = step->ints(), *starts = slots + n, *lengths = starts + n, *offsets = lengths + n;
  int32_t *top_k = offsets + n + 1, *choices = top_k + s;
  float *temperature = step->floats(), *top_p = temperature + s, *min_p = top_p + s;
  int64_t token = 0, row = 0, sampled = 0, fed = 0;
  offsets[0] = 0;
  for (int64_t from = 0; from < in.rows; ++from) {
    const int64_t slot = in.slots[from], length = in.lengths[from], start = in.starts[from];
    const int32_t* blocks = table_.blocks + slot * table_.blocks_max;
    for (int64_t i = 0; i < length; ++i) {
      const int64_t position = start + i;
      token_ids[token + i] = in.token_ids[token + i];
      positions[token + i] = position;
      cache_slots[token + i] =
          int64_t{blocks[position / table_.block_tokens]} * table_.block_tokens + position % table_.block_tokens;
    }
    const int64_t cut = from < in.decodes ? length : 1, each = length / cut;
    for (int64_t i = 0; i < cut; ++i, ++row) {
      const int64_t first = token + i * each, end = start + (i + 1) * each;
      slots[row] = static_cast<int32_t>(slot);
      starts[row] = static_cast<int32_t>(start + i * each);
      lengths[row] = static_cast<int32_t>(each);
      offsets[row + 1] = static_cast<int32_t>(first + each);
      if (in.feedback[from] != 0) {
        fed_at[fed] = first;
        fed_slots[fed++] = slot;
      }
      if (in.samples[from] == 0) continue;
      sample_rows[sampled] = first + each - 1;
      sample_slots[sampled] = slot;
      sample_ends[sampled] = end;
      places[sampled] = end - settings_.output_start[slot];
      seeds[sampled] = settings_.seed[slot];
      top_k[sampled] = settings_.top_k[slot];
      choices[sampled] = settings_.choice[slot];
      temperature[sampled] = settings_.temperature[slot];
      top_p[sampled] = settings_.top_p[slot];
      min_p[sampled++] = settings_.min_p[slot];
    }
    token += length;
  }
  return step;
}

void HostSteps::run(Program& program, const Table& sampler, int64_t vocab, HostStep& step, uint32_t* tokens,
                    std::vector<int64_t>& broken) {
  const int64_t t = step.tokens, n = step.rows, s = step.sampled;
  int64_t *token_ids = step.longs(), *positions = token_ids + t, *cache_slots = positions + t;
  int64_t *sample_rows = cache_slots + t, *sample_slots = sample_rows + s, *places = sample_slots + 2 * s;
  int64_t *seeds = places + s, *fed_at = seeds + s, *fed_slots = fed_at + step.fed;
  const int32_t *slots = step.ints(), *starts = slots + n, *lengths = starts + n, *offsets = lengths + n;
  const int32_t *top_k = offsets + n + 1, *choices = top_k + s;
  const float *temperature = step.floats(), *top_p = temperature + s, *min_p = top_p + s;
  for (int64_t i = 0; i < step.fed; ++i) token_ids[fed_at[i]] = place_.last_token[fed_slots[i]];
  const auto room = static_cast<size_t>(s);
  const bool greedy = std::none_of(temperature, temperature + s, [](float t) { return t > 0; });
  if (greedy) {
    winners_ = std::vector<Winner>(room);
  } else if (logits_.size() < room * static_cast<size_t>(vocab)) {
    logits_.resize(room * static_cast<size_t>(vocab));
  }
  program.run({t,
               n,
               step.decodes,
               s,
               token_ids,
               positions,
               cache_slots,
               sample_rows,
               {table_.blocks, table_.slots, table_.blocks_max, slots, starts, lengths, offsets, 0, 0, 0},
               place_.caches.data(),
               place_.blocks,
               table_.block_tokens,
               logits_.data(),
               greedy ? winners_.data() : nullptr});
  if (s == 0) return;
  chosen_.resize(room);
  if (greedy) {
    for (size_t i = 0; i < room; ++i) {
      if (winners_[i].broken.load() != 0) broken.push_back(static_cast<int64_t>(i));
      chosen_[i] = winners_[i].token();
    }
  } else {
    finite_.resize(room);
    finite_rows(s, vocab, logits_.data(), vocab, finite_.data());
    for (int64_t i = 0; i < s; ++i) {
      if (finite_[static_cast<size_t>(i)] != 0) continue;
      broken.push_back(i);
      std::fill_n(logits_.begin() + i * vocab, vocab, 0.0f);
    }
    sample(sampler,
           {s, vocab, logits_.data(), vocab, temperature, top_p, min_p, top_k, seeds, choices, places, chosen_.data()});
  }
  for (int64_t i = 0; i < s; ++i) {
    place_.last_token[sample_slots[i]] = chosen_[static_cast<size_t>(i)];
    tokens[i] = static_cast<uint32_t>(chosen_[static_cast<size_t>(i)]);
  }
}

}  // namespace tokenrelay

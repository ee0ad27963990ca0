#include "sampling.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "pool.hpp"

namespace tokenrelay {
namespace {

constexpr int64_t kWeightOne = int64_t{1} << 42;
constexpr int64_t kRun = 4096;  // tokens whose weights are summed before one of them is looked for
constexpr float kLargest = std::numeric_limits<float>::max();

// Philox-4x32-10 (Salmon et al. 2011), the first two words of its output.
uint64_t philox(uint64_t seed, uint32_t choice, uint64_t position) {
  uint32_t c0 = static_cast<uint32_t>(position), c1 = static_cast<uint32_t>(position >> 32), c2 = choice, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c0, b = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return (static_cast<uint64_t>(c1) << 32) | c0;
}

// random * total / 2^64, in [0, total).
int64_t scaled(uint64_t random, int64_t total) {
  __extension__ using Wide = unsigned __int128;
  return static_cast<int64_t>((static_cast<Wide>(random) * static_cast<uint64_t>(total)) >> 64);
}

// The first index at which the running sum of weights exceeds `left`; the caller made sure that one does.
template <class WeightAt>
int64_t walk(int64_t& left, int64_t count, WeightAt&& weight_at) {
  for (int64_t i = 0; i < count; ++i) {
    if (left < weight_at(i)) return i;
    left -= weight_at(i);
  }
  throw std::logic_error("token weights do not add up");
}

// A token that may be drawn. Order: the larger logit first, the lower id among equals.
struct Candidate {
  float logit;
  int32_t id;
  int64_t weight;
};
bool likelier(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

float cleaned(float logit) {
  if (std::isnan(logit)) return -std::numeric_limits<float>::infinity();
  return std::min(logit, kLargest);
}

int64_t first_at(const float* logits, int64_t vocab, float max) {
  for (int64_t i = 0; i < vocab; ++i) {
    if (cleaned(logits[i]) == max) return i;
  }
  return 0;
}

// No filter: sum the weights in runs, find the run, then the token.
int64_t draw_from_all(const Table& table, const float* logits, int64_t vocab, float max, double inverse,
                      uint64_t random) {
  std::vector<int64_t> sums;
  int64_t total = 0;
  for (int64_t i = 0; i < vocab; i += kRun) {
    sums.push_back(table.token_weights(logits + i, min_of(kRun, vocab - i), max, inverse, nullptr));
    total += sums.back();
  }
  int64_t left = scaled(random, total);
  const int64_t first =
      kRun * walk(left, static_cast<int64_t>(sums.size()), [&](int64_t i) { return sums[static_cast<size_t>(i)]; });
  int64_t weights[kRun];
  table.token_weights(logits + first, min_of(kRun, vocab - first), max, inverse, weights);
  return first + walk(left, min_of(kRun, vocab - first), [&](int64_t i) { return weights[i]; });
}

// Where the likeliest tokens end: the last one that stays.
struct Cut {
  float logit;
  int32_t id;
  bool keeps(float other, int64_t other_id) const { return other > logit || (other == logit && other_id <= id); }
};

// A row's tokens by likelihood, sorted only as far as a question needs it: first into buckets, then inside one.
class Ranking {
 public:
  // weights [vocab]: 0 for tokens that are out already.
  Ranking(const float* logits, int64_t* weights, int64_t vocab, float max, double inverse)
      : logits_(logits), weights_(weights), vocab_(vocab), buckets_(static_cast<size_t>(vocab)) {
    // Any function that never rises with the logit will do; weights vanish about 29.1 below the maximum.
    const float scale = static_cast<float>(std::min(inverse, 1e30)) * (kBuckets / 30.0f);
    for (size_t i = 0; i < buckets_.size(); ++i) {
      const float distance = (max - std::min(logits[i], kLargest)) * scale;
      buckets_[i] = static_cast<uint16_t>(distance < kBuckets - 1 ? distance : kBuckets - 1);  // a NaN goes last
    }
  }

  // Tokens stay, likeliest first, while fewer than `count` stand before them and those weigh less than `bound`. The
  // others lose their weight. At least one token must have one.
  void keep(int64_t count, int64_t bound) {
    std::array<int64_t, kBuckets> number{}, weight{};
    for (size_t i = 0; i < buckets_.size(); ++i) {
      number[buckets_[i]] += weights_[i] != 0 ? 1 : 0;
      weight[buckets_[i]] += weights_[i];
    }
    int64_t number_before = 0, weight_before = 0;
    size_t bucket = 0;  // that in which the cut lies
    while (bucket + 1 < kBuckets && number_before + number[bucket] < count && weight_before + weight[bucket] < bound) {
      number_before += number[bucket];
      weight_before += weight[bucket];
      ++bucket;
    }
    std::vector<Candidate> open;
    for (size_t i = 0; i < buckets_.size(); ++i) {
      if (buckets_[i] == bucket && weights_[i] != 0) {
        open.push_back({cleaned(logits_[i]), static_cast<int32_t>(i), weights_[i]});
      }
    }
    const Cut cut = cut_in(open, count - number_before, bound - weight_before);
    for (size_t i = 0; i < buckets_.size(); ++i) {
      const bool out =
          buckets_[i] > bucket || (buckets_[i] == bucket && !cut.keeps(cleaned(logits_[i]), static_cast<int64_t>(i)));
      if (out) weights_[i] = 0;
    }
  }

  int64_t total() const {
    int64_t sum = 0;
    for (int64_t i = 0; i < vocab_; ++i) sum += weights_[i];
    return sum;
  }

 private:
  static constexpr int kBuckets = 1024;

  // The last candidate that stays, by halving what is open; none stays where the limits are used up already.
  static Cut cut_in(std::vector<Candidate>& open, int64_t count, int64_t bound) {
    constexpr std::ptrdiff_t kSmall = 64;
    auto begin = open.begin(), end = open.end();
    int64_t number_before = 0, weight_before = 0;
    while (end - begin > kSmall) {
      // All in [open.begin(), begin) stays, all from `end` on goes.
      const auto middle = begin + (end - begin) / 2;
      std::nth_element(begin, middle, end, likelier);
      int64_t weight = weight_before;
      for (auto it = begin; it != middle; ++it) weight += it->weight;
      const int64_t number = number_before + (middle - begin);
      if (number < count && weight < bound) {  // the middle one stays, and all before it
        number_before = number;
        weight_before = weight;
        begin = middle;
      } else {
        end = middle;
      }
    }
    std::sort(begin, end, likelier);
    while (begin != end && number_before < count && weight_before < bound) {
      ++number_before;
      weight_before += begin->weight;
      ++begin;
    }
    if (begin == open.begin()) return {std::numeric_limits<float>::infinity(), -1};
    return {(begin - 1)->logit, (begin - 1)->id};
  }

  const float* logits_;
  int64_t* weights_;
  int64_t vocab_;
  std::vector<uint16_t> buckets_;
};

int64_t draw_filtered(const Table& table, const Sampling& s, int64_t row, const float* logits, float max,
                      double inverse, uint64_t random) {
  constexpr int64_t kAll = std::numeric_limits<int64_t>::max();
  int64_t* weights = static_cast<int64_t*>(scratch(0, s.vocab * 8));
  table.token_weights(logits, s.vocab, max, inverse, weights);
  const float min_p = std::min(s.min_p[row], 1.0f);
  if (min_p > 0) {
    const auto lightest = static_cast<int64_t>(static_cast<double>(min_p) * static_cast<double>(kWeightOne));
    for (int64_t i = 0; i < s.vocab; ++i) weights[i] = weights[i] >= lightest ? weights[i] : 0;
  }
  const bool cut_number = s.top_k[row] > 0 && s.top_k[row] < s.vocab, cut_weight = s.top_p[row] < 1.0f;
  if (cut_number || cut_weight) {
    Ranking ranking(logits, weights, s.vocab, max, inverse);
    if (cut_number) ranking.keep(s.top_k[row], kAll);
    if (cut_weight) {
      const double share = std::max(static_cast<double>(s.top_p[row]), 0.0);
      const auto bound = static_cast<int64_t>(share * static_cast<double>(ranking.total()));
      ranking.keep(kAll, max_of(bound, 1));  // at least 1: the likeliest token stays
    }
  }
  int64_t total = 0;
  for (int64_t i = 0; i < s.vocab; ++i) total += weights[i];
  int64_t left = scaled(random, total);
  return walk(left, s.vocab, [&](int64_t i) { return weights[i]; });
}

// The likeliest token, in one pass: the runs' maxima, then the first run that has it.
int64_t likeliest(const Table& table, const float* logits, int64_t vocab) {
  float max = -std::numeric_limits<float>::infinity();
  int64_t run = 0;
  for (int64_t i = 0; i < vocab; i += kRun) {
    const float top = table.max_logit(logits + i, min_of(kRun, vocab - i));
    if (top > max) {
      max = top;
      run = i;
    }
  }
  if (max == -std::numeric_limits<float>::infinity()) return 0;
  return run + first_at(logits + run, min_of(kRun, vocab - run), max);
}

int64_t sample_row(const Table& table, const Sampling& s, int64_t row) {
  const float* logits = s.logits + row * s.stride;
  if (!(s.temperature[row] > 0)) return likeliest(table, logits, s.vocab);
  const float max = table.max_logit(logits, s.vocab);
  if (max == -std::numeric_limits<float>::infinity()) return 0;
  const double inverse = 1.0 / static_cast<double>(s.temperature[row]);
  const uint64_t random = philox(static_cast<uint64_t>(s.seed[row]), static_cast<uint32_t>(s.choice[row]),
                                 static_cast<uint64_t>(s.position[row]));
  const bool filtered = s.top_p[row] < 1.0f || s.min_p[row] > 0 || (s.top_k[row] > 0 && s.top_k[row] < s.vocab);
  return filtered ? draw_filtered(table, s, row, logits, max, inverse, random)
                  : draw_from_all(table, logits, s.vocab, max, inverse, random);
}

void logprobs_row(const Table& table, const Logprobs& l, int64_t row) {
  const float* logits = l.logits + row * l.stride;
  const float max = table.max_logit(logits, l.vocab);
  const double log_sum = std::log(table.sum_exp(logits, l.vocab, max));
  const auto logprob = [&](int64_t id) {
    return static_cast<float>(static_cast<double>(logits[id]) - static_cast<double>(max) - log_sum);
  };
  l.chosen[row] = logprob(l.tokens[row]);
  if (l.top_k == 0) return;
  std::vector<int64_t> order(static_cast<size_t>(l.vocab));
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
  std::partial_sort(order.begin(), order.begin() + l.top_k, order.end(), [&](int64_t a, int64_t b) {
    const float x = cleaned(logits[a]), y = cleaned(logits[b]);
    return x > y || (x == y && a < b);
  });
  for (int64_t i = 0; i < l.top_k; ++i) {
    l.top_tokens[row * l.top_k + i] = order[static_cast<size_t>(i)];
    l.top[row * l.top_k + i] = logprob(order[static_cast<size_t>(i)]);
  }
}

void check_tokens(const char* name, const int64_t* tokens, int64_t count, int64_t vocab) {
  for (int64_t i = 0; i < count; ++i) {
    if (tokens[i] < 0 || tokens[i] >= vocab) {
      throw std::invalid_argument(std::string(name) + "[" + std::to_string(i) + "] is " + std::to_string(tokens[i]) +
                                  ", the vocabulary has " + std::to_string(vocab));
    }
  }
}

void check_offsets(const char* name, const int64_t* offsets, int64_t count, int64_t total) {
  for (int64_t i = 0; i < count; ++i) {
    if (offsets[i] < 0 || offsets[i] > offsets[i + 1] || offsets[i + 1] > total) {
      throw std::invalid_argument(std::string(name) + " must ascend from 0 to the number of entries");
    }
  }
}

}  // namespace

void sample(const Table& table, const Sampling& sampling) {
  parallel_for(sampling.rows, [&](int64_t row) { sampling.tokens[row] = sample_row(table, sampling, row); });
}

void token_logprobs(const Table& table, const Logprobs& logprobs) {
  check_tokens("token_ids", logprobs.tokens, logprobs.rows, logprobs.vocab);
  parallel_for(logprobs.rows, [&](int64_t row) { logprobs_row(table, logprobs, row); });
}

void apply_penalties(const Penalties& p) {
  check_tokens("rows", p.row, p.count, p.rows);
  check_tokens("token_ids", p.tokens, p.seen_total, p.vocab);
  check_tokens("bias_token_ids", p.bias_tokens, p.bias_total, p.vocab);
  check_offsets("offsets", p.offsets, p.count, p.seen_total);
  check_offsets("bias_offsets", p.bias_offsets, p.count, p.bias_total);
  parallel_for(p.count, [&](int64_t i) {
    float* logits = p.logits + p.row[i] * p.stride;
    for (int64_t j = p.offsets[i]; j < p.offsets[i + 1]; ++j) {
      float value = logits[p.tokens[j]];
      value = value > 0 ? value / p.repetition[i] : value * p.repetition[i];
      value -= p.frequency[i] * static_cast<float>(p.output_counts[j]);
      if (p.output_counts[j] > 0) value -= p.presence[i];
      logits[p.tokens[j]] = value;
    }
    for (int64_t j = p.bias_offsets[i]; j < p.bias_offsets[i + 1]; ++j) logits[p.bias_tokens[j]] += p.bias[j];
  });
}

void finite_rows(int64_t rows, int64_t vocab, const float* logits, int64_t stride, uint8_t* finite) {
  parallel_for(rows, [&](int64_t row) {
    constexpr uint32_t kExponent = 0x7f800000u;  // all of its bits are set in infinities and in what is no number
    const float* x = logits + row * stride;
    uint32_t found = 0;
    for (int64_t i = 0; i < vocab; ++i) {
      uint32_t bits;
      std::memcpy(&bits, x + i, sizeof bits);
      found |= (bits & kExponent) == kExponent ? 1u : 0u;
    }
    finite[row] = found == 0 ? 1 : 0;
  });
}

}  // namespace tokenrelay

#include "tokenrelay/scheduler/reuse.hpp"

#include <algorithm>
#include <bit>

namespace tokenrelay::scheduler {
namespace {

constexpr int tick_shift = 10;    // idle times are counted in 1024 us
constexpr int refit_first = 256;  // observations of a kind, for its first fits
constexpr int refit_every = 1024;
constexpr int first_fits = 8;
constexpr float decay = 0.9F;          // of what was seen, at each fit: the last ten thousand observations or so count
constexpr double prior_hazard = 0.08;  // of coming back before one is half as old again, when nothing was seen
constexpr double prior_weight = 48;    // blocks; those of one sequence come and go together

constexpr std::array<double, ReuseModel::buckets + 1> make_edges() {
  std::array<double, ReuseModel::buckets + 1> edges{};
  for (int bucket = 1; bucket <= ReuseModel::buckets; ++bucket) {
    const double octave = static_cast<double>(1ULL << (bucket / 2));
    edges[static_cast<std::size_t>(bucket)] = 1024.0 * octave * (bucket % 2 == 0 || bucket == 1 ? 1.0 : 1.5);
  }
  return edges;
}
constexpr auto edges = make_edges();

/// Even in the logarithm of the idle time, as far as buckets are: their ends are 1.5 or 1.33 times their beginnings.
constexpr double prior_of(std::size_t bucket) {
  return bucket < 2 || bucket % 2 == 0 ? prior_hazard : prior_hazard * 0.71;
}

}  // namespace

ReuseModel::ReuseModel() noexcept {
  for (Kind& kind : kinds_) fit(kind);
}

int ReuseModel::bucket_of(std::int64_t idle_us) noexcept {
  const auto ticks = static_cast<std::uint64_t>(std::max<std::int64_t>(idle_us, 0)) >> tick_shift;
  if (ticks < 2) return static_cast<int>(ticks) == 0 ? 0 : 1;
  const int octave = static_cast<int>(std::bit_width(ticks)) - 1;
  const int half = static_cast<int>(ticks >> (octave - 1) & 1U);
  return std::min(buckets - 1, 2 * octave + half);
}

double ReuseModel::begin_us(int bucket) noexcept { return edges[static_cast<std::size_t>(bucket)]; }

void ReuseModel::reused(ReuseKind which, std::int64_t idle_us) noexcept {
  Kind& kind = kinds_[which];
  --kind.watched;
  kind.reused[static_cast<std::size_t>(bucket_of(idle_us))] += 1;
  observed(kind);
}

void ReuseModel::gone(ReuseKind which, std::int64_t idle_us) noexcept {
  Kind& kind = kinds_[which];
  --kind.watched;
  kind.gone[static_cast<std::size_t>(bucket_of(idle_us))] += 1;
  longest_us_ = idle_us;
  observed(kind);
}

void ReuseModel::observed(Kind& kind) noexcept {
  if (++kind.fresh < (kind.fits < first_fits ? refit_first : refit_every)) return;
  kind.fresh = 0;
  kind.fits += kind.fits < first_fits;
  for (float& count : kind.reused) count *= decay;
  for (float& count : kind.gone) count *= decay;
  fit(kind);
}

/// From counts to hazards (Kaplan and Meier, 1958: what was given up on counts as alive until then), from hazards to
/// the index. What is watched now counts too: blocks became idle evenly over the time that they are watched for, so
/// the share of them that is older than a bucket falls in a line.
void ReuseModel::fit(Kind& kind) const noexcept {
  std::array<double, buckets> hazard{};
  const auto watched = static_cast<double>(std::max<std::int64_t>(kind.watched, 0));
  const auto span_us =
      static_cast<double>(std::max<std::int64_t>(longest_us_ > 0 ? longest_us_ : now_us_ - first_us_, 1));
  double at_risk = 0;
  for (std::size_t bucket = buckets; bucket-- > 0;) {
    const auto came = static_cast<double>(kind.reused[bucket]);
    at_risk += came + static_cast<double>(kind.gone[bucket]);
    const double older = watched * std::max(0.0, 1 - edges[bucket] / span_us);
    hazard[bucket] = (came + prior_weight * prior_of(bucket)) / (at_risk + older + prior_weight);
  }
  for (std::size_t begin = 0; begin < buckets; ++begin) {
    double alive = 1;
    double reuses = 0;
    double kept_us = 0;
    double best_reuses = 0;
    double best_us = 1;
    for (std::size_t bucket = begin; bucket < buckets; ++bucket) {
      kept_us += alive * (edges[bucket + 1] - edges[bucket]) * (1 - hazard[bucket] / 2);
      reuses += alive * hazard[bucket];
      alive *= 1 - hazard[bucket];
      if (reuses * best_us > best_reuses * kept_us) {  // the quotient is larger
        best_reuses = reuses;
        best_us = kept_us;
      }
    }
    kind.rate[begin] = best_reuses / best_us;
  }
}

/// The rates are those at the beginnings of buckets; in between it goes in a line.
double ReuseModel::rate(ReuseKind which, std::int64_t idle_us) const noexcept {
  const auto bucket = static_cast<std::size_t>(bucket_of(idle_us));
  const auto& rate = kinds_[which].rate;
  if (bucket + 1 == buckets) return rate[bucket];
  const double into = static_cast<double>(std::max<std::int64_t>(idle_us, 0)) - edges[bucket];
  return rate[bucket] + (rate[bucket + 1] - rate[bucket]) * into / (edges[bucket + 1] - edges[bucket]);
}

ReuseModel::Seen ReuseModel::seen(ReuseKind which) const noexcept {
  const Kind& kind = kinds_[which];
  Seen out;
  for (const float count : kind.reused) out.reused += static_cast<double>(count);
  for (const float count : kind.gone) out.gone += static_cast<double>(count);
  out.watched = kind.watched;
  return out;
}

}  // namespace tokenrelay::scheduler

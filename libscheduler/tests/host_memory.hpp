// Host memory and whoever copies, for the simulator: a copy may touch what it was given from the moment it was issued
// until it has ended, so its target holds nonsense meanwhile, again and again; what it copies it reads at its end.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "check.hpp"
#include "tokenrelay/scheduler/scheduler.hpp"

namespace simulation {

using namespace tokenrelay::scheduler;

class HostMemory {
 public:
  explicit HostMemory(const Config& config)
      : width_(static_cast<std::size_t>(config.block_tokens)),
        slots_(static_cast<std::size_t>(config.host_blocks) * width_) {}

  /// Takes what the scheduler wants copied. `kv` is the device's, by block and place.
  void take(Scheduler& scheduler, std::vector<std::uint64_t>& kv) {
    Copies copies;
    scheduler.take_copies(copies);
    for (std::size_t i = 0; i < copies.store_ids.size(); ++i) {
      flying_.push_back({copies.store_ids[i], copies.store_blocks[i], copies.store_slots[i], false, ++issued_});
    }
    for (std::size_t i = 0; i < copies.load_ids.size(); ++i) {
      flying_.push_back({copies.load_ids[i], copies.load_blocks[i], copies.load_slots[i], true, ++issued_});
    }
    for (const Flying& copy : flying_) scribble(copy, kv);
    late_ += scheduler.take_late_copies().size();
  }

  /// One of them ends: well, and its target holds its source; or in vain, and it holds nonsense.
  void end(Scheduler& scheduler, std::vector<std::uint64_t>& kv, std::uint64_t random, bool well) {
    if (flying_.empty()) return;
    const auto at = flying_.begin() + static_cast<std::ptrdiff_t>(random % flying_.size());
    const Flying copy = *at;
    flying_.erase(at);
    for (std::size_t i = 0; i < width_ && well; ++i) {
      if (copy.load) {
        device(copy, kv, i) = host(copy, i);
      } else {
        host(copy, i) = device(copy, kv, i);
      }
    }
    const std::uint64_t ids[] = {copy.id};
    CHECK_EQUAL(well ? scheduler.copied(ids) : scheduler.copy_failed(ids), 1U);
    CHECK_EQUAL(scheduler.copied(ids) + scheduler.copy_failed(ids), 0U);  // it ended already
  }
  [[nodiscard]] std::size_t in_flight() const { return flying_.size(); }
  /// As a transcript counts it.
  [[nodiscard]] std::uint64_t number_of(std::size_t which) const { return flying_[which].number; }
  [[nodiscard]] std::size_t late() const { return late_; }

 private:
  struct Flying {
    std::uint64_t id;
    std::int32_t block;
    std::int32_t slot;
    bool load;
    std::uint64_t number;
  };
  std::uint64_t& device(const Flying& copy, std::vector<std::uint64_t>& kv, std::size_t i) const {
    return kv[static_cast<std::size_t>(copy.block) * width_ + i];
  }
  std::uint64_t& host(const Flying& copy, std::size_t i) {
    return slots_[static_cast<std::size_t>(copy.slot) * width_ + i];
  }
  void scribble(const Flying& copy, std::vector<std::uint64_t>& kv) {
    for (std::size_t i = 0; i < width_; ++i) (copy.load ? device(copy, kv, i) : host(copy, i)) = 0xbad;
  }

  std::size_t width_;
  std::vector<std::uint64_t> slots_;
  std::vector<Flying> flying_;
  std::size_t late_ = 0;
  std::uint64_t issued_ = 0;
};

}  // namespace simulation

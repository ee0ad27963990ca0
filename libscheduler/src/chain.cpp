#include "tokenrelay/scheduler/chain.hpp"

namespace tokenrelay::scheduler {

void BlockChain::launch(block::Records& records, int start, int length, int block_tokens) noexcept {
  if (length == 0) return;
  const auto first = static_cast<std::size_t>(start / block_tokens);
  const auto last = static_cast<std::size_t>((start + length - 1) / block_tokens);
  for (std::size_t index = first; index <= last; ++index) {
    const std::size_t at = index - sealed_.size();
    if (at < in_flight_.size()) {
      in_flight_.apply(at, block::Launch{records});
    } else {
      TR_ASSERT(at == in_flight_.size(), "a sequence writes its blocks in order");
      in_flight_.push_back(on(writable_.pop_back(), block::Launch{records}));
    }
  }
}

void BlockChain::unlaunch(block::Records& records) noexcept {
  while (!in_flight_.empty()) writable_.push_back(on(in_flight_.pop_back(), block::LandLast{records}));
}

std::optional<Content> BlockChain::keep_rest(BlockPool& pool, const std::optional<Content>& rest) noexcept {
  if (!rest || !in_flight_.empty()) return rest;
  if (!writable_.empty()) {
    if (std::optional<SealedPin> pin = pool.seal_part(writable_.pop_back(), *rest)) sealed_.push_back(std::move(*pin));
  }
  return std::nullopt;
}

Remains BlockChain::abandon(BlockPool& pool, const std::optional<Content>& rest) && noexcept {
  const std::optional<Content> left = keep_rest(pool, rest);
  trim(pool);
  auto quarantined = std::move(in_flight_).retype<QuarantinedBlock>([&pool](InFlightBlock&& block) noexcept {
    return pool.abandon(std::move(block));
  });
  return {std::move(sealed_), std::move(quarantined), left};
}

void Remains::land(BlockPool& pool, int start, int length, int block_tokens) noexcept {
  if (length == 0) return;
  const auto first = static_cast<std::size_t>(start / block_tokens);
  const auto last = static_cast<std::size_t>((start + length - 1) / block_tokens);
  for (std::size_t index = first; index <= last; ++index) {
    const std::size_t at = index - first_;
    const BlockId id = quarantined_.numbers()[at];
    if (pool.records()[static_cast<std::size_t>(id)].writers > 1) {
      quarantined_.apply(at, block::Land{pool.records()});
    } else {
      TR_ASSERT(at == 0, "blocks of a sequence land in order");
      block::Free block = on(quarantined_.pop_front(), block::LandLast{pool.records()});
      ++first_;
      if (!rest_) {
        pool.put(std::move(block));
      } else if (std::optional<SealedPin> pin = pool.keep_part(std::move(block), *std::exchange(rest_, std::nullopt))) {
        pins_.push_back(std::move(*pin));
      }
    }
  }
}

void Remains::release(BlockPool& pool) && noexcept {
  TR_ASSERT(quarantined_.empty(), "a launched step may still write a quarantined block");
  while (!pins_.empty()) {
    SealedPin pin = pins_.pop_back();
    pool.unpin(std::move(pin), pins_.size());
  }
}

}  // namespace tokenrelay::scheduler

#include "tokenrelay/scheduler/exports.hpp"

namespace tokenrelay::scheduler {
namespace {

void give_back(handle::Stake&& stake, BlockPool& pool) noexcept {
  pool.releasing({});
  while (!stake.empty()) pool.unpin(stake.take());
}

}  // namespace

std::span<const SealedPin> Exports::pins(std::uint64_t id) const noexcept {
  const handle::Stake* stake = stake_of(handles_[static_cast<std::size_t>(ids_.find(id))]);
  return stake == nullptr ? std::span<const SealedPin>{} : stake->pins();
}

void Exports::reserve(std::uint64_t id, std::size_t blocks_max) {
  TR_ASSERT(!full() && !contains(id), "a handle is reserved once, when there is room");
  handle::Stake room(blocks_max);
  const std::int32_t at = vacant_.back();
  vacant_.pop_back();
  ids_.set(id, at);
  Slot& slot = handles_[static_cast<std::size_t>(at)];
  slot.emplace<handle::Unused>();
  const auto rejected = fsm::dispatch<HandleFsm>(slot, handle::Reserve{std::move(room)});
  TR_ASSERT(!rejected, "an unused handle cannot be reserved");
}

void Exports::seal(std::uint64_t id, handle::Stake&& sealed, BlockPool& pool) noexcept {
  const std::int32_t at = ids_.find(id);
  if (at == IdMap::none || fsm::dispatch<HandleFsm>(handles_[static_cast<std::size_t>(at)], handle::Seal{sealed})) {
    give_back(std::move(sealed), pool);
  }
}

std::optional<fsm::Rejected> Exports::send(Slot& slot, HandleEvent event, handle::Stake& freed) noexcept {
  switch (event) {
    case HandleEvent::offer:
      return fsm::dispatch<HandleFsm>(slot, handle::Offer{});
    case HandleEvent::claim:
      return fsm::dispatch<HandleFsm>(slot, handle::Claim{});
    case HandleEvent::transfer:
      return fsm::dispatch<HandleFsm>(slot, handle::Transfer{});
    case HandleEvent::adopt:
      return fsm::dispatch<HandleFsm>(slot, handle::Adopt{});
    case HandleEvent::decline:
      return fsm::dispatch<HandleFsm>(slot, handle::Decline{});
    case HandleEvent::acknowledge:
      return fsm::dispatch<HandleFsm>(slot, handle::Acknowledge{});
    case HandleEvent::release:
      return fsm::dispatch<HandleFsm>(slot, handle::Release{freed});
    case HandleEvent::quarantine:
      return fsm::dispatch<HandleFsm>(slot, handle::Quarantine{});
    case HandleEvent::expire:
      return fsm::dispatch<HandleFsm>(slot, handle::Expire{});
    case HandleEvent::reclaim:
      return fsm::dispatch<HandleFsm>(slot, handle::Reclaim{freed});
    case HandleEvent::fence:
      return fsm::dispatch<HandleFsm>(slot, handle::Fence{freed});
    case HandleEvent::lose:
      return fsm::dispatch<HandleFsm>(slot, handle::Lose{freed});
  }
  return fsm::Rejected{"no such event"};  // a number that is none of them
}

std::optional<std::string_view> Exports::apply(std::uint64_t id, HandleEvent event, BlockPool& pool) noexcept {
  const std::int32_t at = ids_.find(id);
  if (at == IdMap::none) return "there is no such handle";
  Slot& slot = handles_[static_cast<std::size_t>(at)];
  handle::Stake freed;
  if (const auto rejected = send(slot, event, freed)) return rejected->reason;
  if (stake_of(slot) == nullptr) {  // over
    give_back(std::move(freed), pool);
    ids_.erase(id);
    vacant_.push_back(at);
  }
  return std::nullopt;
}

void Exports::lose_all(BlockPool& pool) noexcept {
  for (Slot& slot : handles_) {
    handle::Stake freed;
    if (stake_of(slot) == nullptr || send(slot, HandleEvent::lose, freed)) continue;
    give_back(std::move(freed), pool);
  }
}

std::string_view Exports::state(std::uint64_t id) const noexcept {
  const std::int32_t at = ids_.find(id);
  if (at == IdMap::none) return {};
  return std::visit([]<class S>(const S&) { return S::name; }, handles_[static_cast<std::size_t>(at)]);
}

}  // namespace tokenrelay::scheduler

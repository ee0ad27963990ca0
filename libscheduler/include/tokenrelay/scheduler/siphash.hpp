// The identity of a full block: SipHash-2-4 with 128 bits of output, keyed and chained. The one implementation: the
// scheduler's prefix index, the directory, the tiers and the wire all use this value.
//
//     Hash128 parent = root_hash(key, model_identity, salt);
//     parent = chain_hash(key, parent, first_block_tokens);   // H(key, parent, tokens as little-endian uint32)
//
// Source: Aumasson, Bernstein, "SipHash: a fast short-input PRF" (2012), and the 128-bit variant of its reference code.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace tokenrelay::scheduler {

static_assert(std::endian::native == std::endian::little, "token ids are hashed as little-endian uint32 in place");

using TokenId = std::uint32_t;

struct Hash128 {
  std::uint64_t low = 0;   // bytes 0..7, little-endian
  std::uint64_t high = 0;  // bytes 8..15
  friend constexpr bool operator==(const Hash128&, const Hash128&) noexcept = default;
};

struct HashKey {
  std::uint64_t k0 = 0;
  std::uint64_t k1 = 0;
};

/// 16 bytes, in the order of the reference code.
[[nodiscard]] std::array<std::uint8_t, 16> to_bytes(const Hash128& hash) noexcept;
[[nodiscard]] Hash128 from_bytes(std::span<const std::uint8_t, 16> bytes) noexcept;
[[nodiscard]] HashKey key_from_bytes(std::span<const std::uint8_t, 16> bytes) noexcept;

/// SipHash-2-4-128 of any bytes.
[[nodiscard]] Hash128 siphash128(const HashKey& key, std::span<const std::uint8_t> bytes) noexcept;

/// Where every chain of one model and one tenant begins. Differs for every (model identity, salt).
[[nodiscard]] Hash128 root_hash(const HashKey& key, std::span<const std::uint8_t, 16> model_identity,
                                std::span<const std::uint8_t> salt) noexcept;

/// Of one full block: H(key, parent || token ids). The number of tokens must be even (it is a power of two).
[[nodiscard]] Hash128 chain_hash(const HashKey& key, const Hash128& parent, std::span<const TokenId> block) noexcept;

/// Of every full block of `tokens`, in order; a partial last block has no hash.
[[nodiscard]] std::vector<Hash128> block_hashes(const HashKey& key, const Hash128& root,
                                                std::span<const TokenId> tokens, int block_tokens);

}  // namespace tokenrelay::scheduler

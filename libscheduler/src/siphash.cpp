#include "tokenrelay/scheduler/siphash.hpp"

#include <cstring>

namespace tokenrelay::scheduler {
namespace {

/// The four words of SipHash's state, with its two parameters c = 2 and d = 4 fixed.
struct State {
  std::uint64_t v0, v1, v2, v3;

  explicit State(const HashKey& key) noexcept
      : v0(key.k0 ^ 0x736f6d6570736575ULL),
        v1(key.k1 ^ 0x646f72616e646f6dULL ^ 0xee),  // 0xee: 128 bits of output
        v2(key.k0 ^ 0x6c7967656e657261ULL),
        v3(key.k1 ^ 0x7465646279746573ULL) {}

  void round() noexcept {
    v0 += v1;
    v1 = std::rotl(v1, 13) ^ v0;
    v0 = std::rotl(v0, 32);
    v2 += v3;
    v3 = std::rotl(v3, 16) ^ v2;
    v0 += v3;
    v3 = std::rotl(v3, 21) ^ v0;
    v2 += v1;
    v1 = std::rotl(v1, 17) ^ v2;
    v2 = std::rotl(v2, 32);
  }

  void absorb(std::uint64_t word) noexcept {
    v3 ^= word;
    round();
    round();
    v0 ^= word;
  }

  Hash128 finish() noexcept {
    Hash128 out;
    v2 ^= 0xee;
    for (int i = 0; i < 4; ++i) round();
    out.low = v0 ^ v1 ^ v2 ^ v3;
    v1 ^= 0xdd;
    for (int i = 0; i < 4; ++i) round();
    out.high = v0 ^ v1 ^ v2 ^ v3;
    return out;
  }
};

std::uint64_t load64(const std::uint8_t* bytes) noexcept {
  std::uint64_t word;
  std::memcpy(&word, bytes, sizeof word);
  return word;
}

/// Absorbs the rest of a message of which `before` bytes (a multiple of 8) were absorbed.
Hash128 finish_with(State& state, std::span<const std::uint8_t> bytes, std::size_t before) noexcept {
  std::size_t at = 0;
  for (; at + 8 <= bytes.size(); at += 8) state.absorb(load64(bytes.data() + at));
  std::uint64_t last = static_cast<std::uint64_t>((before + bytes.size()) & 0xff) << 56;
  for (int shift = 0; at < bytes.size(); ++at, shift += 8) last |= static_cast<std::uint64_t>(bytes[at]) << shift;
  state.absorb(last);
  return state.finish();
}

}  // namespace

std::array<std::uint8_t, 16> to_bytes(const Hash128& hash) noexcept {
  std::array<std::uint8_t, 16> bytes{};
  std::memcpy(bytes.data(), &hash.low, 8);
  std::memcpy(bytes.data() + 8, &hash.high, 8);
  return bytes;
}

Hash128 from_bytes(std::span<const std::uint8_t, 16> bytes) noexcept {
  Hash128 hash;
  std::memcpy(&hash.low, bytes.data(), 8);
  std::memcpy(&hash.high, bytes.data() + 8, 8);
  return hash;
}

HashKey key_from_bytes(std::span<const std::uint8_t, 16> bytes) noexcept {
  return {load64(bytes.data()), load64(bytes.data() + 8)};
}

Hash128 siphash128(const HashKey& key, std::span<const std::uint8_t> bytes) noexcept {
  State state(key);
  return finish_with(state, bytes, 0);
}

Hash128 root_hash(const HashKey& key, std::span<const std::uint8_t, 16> model_identity,
                  std::span<const std::uint8_t> salt) noexcept {
  // The tag keeps roots apart from blocks: no block's parent is this text.
  static constexpr std::array<std::uint8_t, 16> tag = {'t', 'o', 'k', 'e', 'n', 'r', 'e', 'l',
                                                       'a', 'y', '.', 'r', 'o', 'o', 't', 0};
  State state(key);
  state.absorb(load64(tag.data()));
  state.absorb(load64(tag.data() + 8));
  state.absorb(load64(model_identity.data()));
  state.absorb(load64(model_identity.data() + 8));
  return finish_with(state, salt, tag.size() + model_identity.size());
}

Hash128 chain_hash(const HashKey& key, const Hash128& parent, std::span<const TokenId> block) noexcept {
  State state(key);
  state.absorb(parent.low);
  state.absorb(parent.high);
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(block.data());
  const std::size_t size = block.size_bytes();
  for (std::size_t at = 0; at + 8 <= size; at += 8) state.absorb(load64(bytes + at));
  state.absorb(static_cast<std::uint64_t>((16 + size) & 0xff) << 56);
  return state.finish();
}

std::vector<Hash128> block_hashes(const HashKey& key, const Hash128& root, std::span<const TokenId> tokens,
                                  int block_tokens) {
  const std::size_t width = static_cast<std::size_t>(block_tokens);
  std::vector<Hash128> hashes;
  hashes.reserve(tokens.size() / width);
  Hash128 parent = root;
  for (std::size_t at = 0; at + width <= tokens.size(); at += width) {
    parent = chain_hash(key, parent, tokens.subspan(at, width));
    hashes.push_back(parent);
  }
  return hashes;
}

}  // namespace tokenrelay::scheduler

"""SipHash-2-4 with 128 bits of output, written from the paper (Aumasson and Bernstein, 2012) for comparison; slow."""

from __future__ import annotations

import struct

WORD = (1 << 64) - 1


def siphash128(key: bytes, message: bytes) -> bytes:
    """16 bytes."""
    k0, k1 = struct.unpack("<QQ", key)
    v = [k0 ^ 0x736F6D6570736575, k1 ^ 0x646F72616E646F6D ^ 0xEE, k0 ^ 0x6C7967656E657261, k1 ^ 0x7465646279746573]

    def rotate(value: int, bits: int) -> int:
        return ((value << bits) | (value >> (64 - bits))) & WORD

    def half(a: int, b: int, bits_b: int, bits_a: int) -> None:
        v[a] = (v[a] + v[b]) & WORD
        v[b] = rotate(v[b], bits_b) ^ v[a]
        v[a] = rotate(v[a], bits_a)

    def rounds(count: int) -> None:
        for _ in range(count):
            half(0, 1, 13, 32)
            half(2, 3, 16, 0)
            half(0, 3, 21, 0)
            half(2, 1, 17, 32)

    padded = message + bytes(7 - len(message) % 8) + bytes([len(message) & 255])
    for (word,) in struct.iter_unpack("<Q", padded):
        v[3] ^= word
        rounds(2)
        v[0] ^= word
    out = b""
    v[2] ^= 0xEE
    for _ in range(2):
        rounds(4)
        out += struct.pack("<Q", v[0] ^ v[1] ^ v[2] ^ v[3])
        v[1] ^= 0xDD
    return out


def block_hashes(tokens: list[int], block_tokens: int, key: bytes, model_identity: bytes, salt: bytes) -> list[bytes]:
    """As docs/scheduler.md has it: a root, then H(key, parent || little-endian token ids) of each full block."""
    parent = siphash128(key, b"tokenrelay.root\0" + model_identity + salt)
    hashes = []
    for at in range(0, len(tokens) - block_tokens + 1, block_tokens):
        parent = siphash128(key, parent + struct.pack(f"<{block_tokens}I", *tokens[at : at + block_tokens]))
        hashes.append(parent)
    return hashes

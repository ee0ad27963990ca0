"""How a layer's KV cache lies in memory. The one description: the executor allocates by it, kernels read by it, and
transfer receives it as bytes per block.

    layout = MlaLayout(rank=512, rope=64, block_tokens=64)
    cache = torch.empty(layout.shape(blocks=1024), dtype=torch.bfloat16)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BLOCK_TOKENS_MAX = 1024


def _positive(layout: object, *names: str) -> None:
    for name in names:
        value = getattr(layout, name)
        if not isinstance(value, int) or value <= 0:
            raise ValueError(f"{type(layout).__name__}.{name} is {value!r}, expected a whole number above 0")


@dataclass(frozen=True, slots=True)
class MlaLayout:
    """A cache of compressed latents: `[blocks, block_tokens, rank + rope]`, latent then rope, row-major."""

    rank: int
    rope: int
    block_tokens: int

    def __post_init__(self) -> None:
        _positive(self, "rank", "rope", "block_tokens")

    @property
    def width(self) -> int:
        """Elements of one token."""
        return self.rank + self.rope

    def shape(self, blocks: int) -> tuple[int, ...]:
        """The shape of one layer's region of `blocks` blocks."""
        return (blocks, self.block_tokens, self.width)

    def bytes_per_block(self, dtype: torch.dtype) -> int:
        """Bytes of one block of one layer."""
        return self.block_tokens * self.width * dtype.itemsize


@dataclass(frozen=True, slots=True)
class GqaLayout:
    """A cache of keys and values: `[blocks, 2, kv_heads, block_tokens, head_dim]`, keys at index 0, row-major."""

    kv_heads: int
    head_dim: int
    block_tokens: int

    def __post_init__(self) -> None:
        _positive(self, "kv_heads", "head_dim", "block_tokens")

    @property
    def width(self) -> int:
        """Elements of one token, keys and values of all heads."""
        return 2 * self.kv_heads * self.head_dim

    def shape(self, blocks: int) -> tuple[int, ...]:
        """The shape of one layer's region of `blocks` blocks."""
        return (blocks, 2, self.kv_heads, self.block_tokens, self.head_dim)

    def bytes_per_block(self, dtype: torch.dtype) -> int:
        """Bytes of one block of one layer."""
        return self.block_tokens * self.width * dtype.itemsize


FP8_GROUP = 128  # latents that share a factor
FACTOR_BYTES = 4  # a float32


def fp8_group(rank: int) -> int:
    """Latents of one token that share a factor in a float8 cache: 128, or all where there are fewer. ValueError for a
    rank that does not divide so."""
    group = min(FP8_GROUP, rank)
    if rank % group or group < 8 or group & (group - 1):
        raise ValueError(f"rank is {rank}, a float8 cache takes a power of two from 8, or a multiple of {FP8_GROUP}")
    return group


@dataclass(frozen=True, slots=True)
class MlaFp8Layout:
    """A cache of latents in float8: `[blocks, block_tokens, width]` bytes, as torch.float8_e4m3fn. A token's bytes are
    `rank` E4M3 latents, a float32 factor for each `fp8_group` of them, and `rope` bfloat16 values, which keep their
    precision (DeepSeek's FlashMLA lays out its float8 cache in the same way)."""

    rank: int
    rope: int
    block_tokens: int

    def __post_init__(self) -> None:
        _positive(self, "rank", "rope", "block_tokens")
        fp8_group(self.rank)
        if self.rope % 2:
            raise ValueError(f"MlaFp8Layout.rope is {self.rope}, expected an even number")

    @property
    def width(self) -> int:
        """Bytes of one token."""
        return self.rank + FACTOR_BYTES * (self.rank // fp8_group(self.rank)) + 2 * self.rope

    def shape(self, blocks: int) -> tuple[int, ...]:
        """The shape of one layer's region of `blocks` blocks."""
        return (blocks, self.block_tokens, self.width)

    def bytes_per_block(self, dtype: torch.dtype) -> int:
        """Bytes of one block of one layer; `dtype` is torch.float8_e4m3fn."""
        return self.block_tokens * self.width * dtype.itemsize


@dataclass(frozen=True, slots=True)
class GqaFp8Layout:
    """A cache of keys and values in float8: `[blocks, 2, kv_heads, block_tokens, head_dim + 4]` bytes, as
    torch.float8_e4m3fn. A token's key of one head, and its value, are `head_dim` E4M3 numbers and a float32 factor."""

    kv_heads: int
    head_dim: int
    block_tokens: int

    def __post_init__(self) -> None:
        _positive(self, "kv_heads", "head_dim", "block_tokens")
        if self.head_dim % FACTOR_BYTES:
            raise ValueError(f"head_dim is {self.head_dim}, a float8 cache takes a multiple of {FACTOR_BYTES}")

    @property
    def width(self) -> int:
        """Bytes of one token, keys and values of all heads."""
        return 2 * self.kv_heads * (self.head_dim + FACTOR_BYTES)

    def shape(self, blocks: int) -> tuple[int, ...]:
        """The shape of one layer's region of `blocks` blocks."""
        return (blocks, 2, self.kv_heads, self.block_tokens, self.head_dim + FACTOR_BYTES)

    def bytes_per_block(self, dtype: torch.dtype) -> int:
        """Bytes of one block of one layer; `dtype` is torch.float8_e4m3fn."""
        return self.block_tokens * self.width * dtype.itemsize


KvLayout = MlaLayout | GqaLayout | MlaFp8Layout | GqaFp8Layout


ABSORBED_TOKENS = 32  # of a row: attending over latents is one product fewer to begin, whatever it costs then


def absorbed_tokens_max(rank: int, nope: int, value: int, start: int) -> int:
    """Up to this many tokens of a row that begins at position `start`, attending over latents costs less than
    projecting them up first.

    Per pair of token and head, latents cost 2 * rank + rope multiplications, keys and values nope + rope + value. Each
    token costs rank * (nope + value) a head for its query and its result, or for its key and value; the cached ones
    before it cost that once more only where they are projected up.
    """
    saved = 2 * rank - nope - value
    if saved <= 0:
        return 1 << 62
    # (n * start + n * n / 2) * saved <= start * rank * (nope + value)
    most = math.isqrt(start * start + 2 * start * rank * (nope + value) // saved) - start
    return max(ABSORBED_TOKENS, most)

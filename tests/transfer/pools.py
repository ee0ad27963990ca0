"""Pools with known content, for both ends of a transfer: content follows from layer, block and generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tokenrelay.transfer.memory import Layout, Memory, SharedPool


def layout(block_bytes: Sequence[int] = (4096, 4096, 1536), **fields: Any) -> Layout:
    """One that pairs with the others."""
    given = {"model_identity": b"m" * 16, "dtype": "bfloat16", "block_tokens": 64, "layout": "mla 512+64", **fields}
    return Layout(block_bytes=tuple(block_bytes), **given)


def content(layer: int, block: int, generation: int, size: int) -> np.ndarray:
    """uint8 [size]: what the owner writes; differs in every argument."""
    seed = (layer * 1_000_003 + block * 8_191 + generation * 131 + 7) & 0xFFFFFFFF
    return (np.arange(size, dtype=np.uint32) * np.uint32(2_654_435_761) + np.uint32(seed * 97 & 0xFFFFFFFF)).view(
        np.uint8
    )[3 : 4 * size : 4]


@dataclass
class Pool:
    """A pool and its memory; zero until filled."""

    layout: Layout
    blocks: int
    shared: SharedPool = field(init=False)
    memory: Memory = field(init=False)

    def __post_init__(self) -> None:
        self.shared = SharedPool(self.layout.block_bytes, self.blocks)
        self.memory = self.shared.memory(self.layout)
        self._arrays = [np.frombuffer(view, dtype=np.uint8).reshape(self.blocks, -1) for view in self.shared.layers]

    def fill(self, blocks: Sequence[int], layers: Sequence[int] | None = None) -> None:
        """As the engine would: with the generation that the block has now."""
        words = self.memory.words(list(blocks)).tolist()
        for layer in range(len(self._arrays)) if layers is None else layers:
            for block, generation in zip(blocks, words, strict=True):
                self._arrays[layer][block] = content(layer, block, generation, self.layout.block_bytes[layer])

    def block(self, layer: int, block: int) -> np.ndarray:
        """uint8 [block_bytes]."""
        return self._arrays[layer][block]

    def holds(self, layer: int, local: int, remote: int, generation: int) -> bool:
        """Whether the local block has what the owner's had in that generation."""
        return bool(
            (self.block(layer, local) == content(layer, remote, generation, self.layout.block_bytes[layer])).all()
        )

    def untouched(self, layer: int, block: int) -> bool:
        """Still zero."""
        return not self.block(layer, block).any()

"""The memory that peers read: one region per layer, a generation word per block, and what makes two of them fit.

layout = Layout(model_identity=…, dtype="bfloat16", block_tokens=64, layout="mla 512+64", block_bytes=(73728,) * 27)
pool = SharedPool(layout.block_bytes, blocks=4096)
cache = torch.frombuffer(pool.layers[0], dtype=torch.bfloat16).view(...)     # the runtime's, zero-copy
memory = pool.memory(layout)
memory.bump([17, 18])            # before blocks 17 and 18 are written for somebody else
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from tokenrelay.base.errors import ConfigError, HandshakeRefused

Words = npt.NDArray[np.uint64]
Blocks = Sequence[int] | npt.NDArray[np.integer]

WORD_BYTES = 8
ALIGNMENT_BYTES = 4096  # of every region: a page
BLOCKS_MAX = 1 << 24
LAYERS_MAX = 4096
F_SEAL_FUTURE_WRITE = 0x10  # fcntl(2), since Linux 5.1; fcntl of Python 3.11 has no name for it


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """What has to be equal at both ends for a block to mean the same there. Sizes of pools may differ."""

    model_identity: bytes
    dtype: str
    block_tokens: int
    layout: str  # as kernels/layout.py puts it, for example "mla 512+64"
    block_bytes: tuple[int, ...]  # of one block, per layer
    parallel_width: int = 1  # tensor-parallel ranks that share a layer's heads

    def check(self, ours: str, other: Layout, theirs: str) -> None:
        """Raise HandshakeRefused that names every difference with both sides and both values."""
        differences = [
            f"{name}: {ours} has {_show(mine)}, {theirs} has {_show(other_value)}"
            for name in ("model_identity", "dtype", "block_tokens", "layout", "parallel_width")
            if (mine := getattr(self, name)) != (other_value := getattr(other, name))
        ]
        if len(self.block_bytes) != len(other.block_bytes):
            differences.append(f"layers: {ours} has {len(self.block_bytes)}, {theirs} has {len(other.block_bytes)}")
        else:
            layer = next(
                (
                    n
                    for n, pair in enumerate(zip(self.block_bytes, other.block_bytes, strict=True))
                    if pair[0] != pair[1]
                ),
                None,
            )
            if layer is not None:
                sizes = self.block_bytes[layer], other.block_bytes[layer]
                differences.append(f"bytes of a block in layer {layer}: {ours} has {sizes[0]}, {theirs} has {sizes[1]}")
        if differences:
            raise HandshakeRefused(f"{ours} and {theirs} do not fit: {'; '.join(differences)}")


def _show(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else repr(value)


@dataclass(frozen=True, slots=True)
class Region:
    """A layer's blocks: block n is `block_bytes` bytes at `address + n * block_stride`."""

    address: int
    block_bytes: int
    block_stride: int
    blocks: int
    device: int | None = None  # CUDA device that holds it; None: host memory

    def __post_init__(self) -> None:
        for name in ("address", "block_bytes", "blocks"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"Region.{name} is {getattr(self, name)}, expected above 0")
        if self.block_stride < self.block_bytes:
            raise ConfigError(f"Region.block_stride is {self.block_stride}, expected at least {self.block_bytes}")

    @property
    def bytes(self) -> int:
        """From the first byte of the first block to the last of the last."""
        return (self.blocks - 1) * self.block_stride + self.block_bytes


class Memory:
    """The pool as transfer sees it. `generations` is the address of uint64 [blocks], in host memory.

    Invariant: block n's word is bumped before anything writes into block n for a new owner, and never goes back. A
    reader compares after its data came (law 4). The memory must outlive every transport that was given it.
    """

    def __init__(
        self, layout: Layout, regions: Sequence[Region], generations: int, shared: SharedPool | None = None
    ) -> None:
        if not 0 < len(regions) <= LAYERS_MAX or len(regions) != len(layout.block_bytes):
            raise ConfigError(f"{len(regions)} regions for {len(layout.block_bytes)} layers; at most {LAYERS_MAX}")
        blocks = regions[0].blocks
        for layer, (region, block_bytes) in enumerate(zip(regions, layout.block_bytes, strict=True)):
            if region.blocks != blocks or region.block_bytes != block_bytes:
                raise ConfigError(
                    f"layer {layer} has {region.blocks} blocks of {region.block_bytes} bytes, "
                    f"expected {blocks} of {block_bytes}"
                )
        if not 0 < blocks <= BLOCKS_MAX:
            raise ConfigError(f"{blocks} blocks, expected 1 to {BLOCKS_MAX}")
        self.layout = layout
        self.regions = tuple(regions)
        self.blocks = blocks
        self.generations = generations
        self.shared = shared  # where other processes can map it, if they can
        self._words: Words = np.ctypeslib.as_array((ctypes.c_uint64 * blocks).from_address(generations))

    def bump(self, blocks: Blocks) -> None:
        """Before the blocks (each named once) are written for somebody else: who still reads them will notice."""
        self._words[np.asarray(blocks, dtype=np.int64)] += np.uint64(1)

    def words(self, blocks: Blocks) -> Words:
        """uint64 [len(blocks)], a copy. Raises IndexError for a block that is not there."""
        index = np.asarray(blocks, dtype=np.int64)
        if index.size and (index.min() < 0 or index.max() >= self.blocks):
            raise IndexError(f"a block outside [0, {self.blocks})")
        return self._words[index]


class SharedPool:
    """Pool memory in a memfd (memfd_create(2)), so that another process of this machine can map it, read-only.

    Pages are taken when they are first touched. The file can neither shrink (a reader would get SIGBUS) nor be written
    or mapped writable by whoever is given its descriptor. Memory on a device is not shared this way.
    """

    def __init__(self, block_bytes: Sequence[int], blocks: int) -> None:
        """Raises ConfigError when there is no room or the sizes are no sizes."""
        if not block_bytes or min(block_bytes) <= 0 or not 0 < blocks <= BLOCKS_MAX:
            raise ConfigError(f"a pool of {blocks} blocks of {list(block_bytes)[:4]} bytes: expected numbers above 0")
        self.blocks = blocks
        self._block_bytes = tuple(block_bytes)
        self._offsets: list[int] = []
        end = 0
        for size in [*(size * blocks for size in block_bytes), blocks * WORD_BYTES]:
            self._offsets.append(end)
            end += -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        self.bytes = end
        self.fd = os.memfd_create("tokenrelay-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, end)
            self._map = mmap.mmap(self.fd, end, mmap.MAP_SHARED)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals)
        except OSError as error:
            os.close(self.fd)
            raise ConfigError(f"cannot make {end} bytes of shared memory: {error.strerror}") from error
        self._view = memoryview(self._map)
        self.address = address_of(self._map)

    @property
    def layers(self) -> list[memoryview]:
        """One writable view of bytes [blocks * block_bytes] per layer; torch.frombuffer takes it as it is."""
        return [
            self._view[offset : offset + size * self.blocks]
            for offset, size in zip(self._offsets, self._block_bytes, strict=False)
        ]

    @property
    def payload_bytes(self) -> int:
        """Of one block, all layers."""
        return sum(self._block_bytes)

    def read_block(self, block: int) -> bytes:
        """A copy of one block, layer after layer. What it holds is for the caller to validate by its generation."""
        return b"".join(part for part in self._parts(block))

    def write_block(self, block: int, payload: bytes) -> None:
        """The reverse. Raises ValueError for a payload of another size; the block is the caller's to write."""
        if len(payload) != self.payload_bytes:
            raise ValueError(f"a block has {self.payload_bytes} bytes, the payload {len(payload)}")
        start, view = 0, memoryview(payload)
        for part in self._parts(block):
            part[:] = view[start : start + len(part)]
            start += len(part)

    def _parts(self, block: int) -> list[memoryview]:
        if not 0 <= block < self.blocks:
            raise ValueError(f"block {block} is outside [0, {self.blocks})")
        return [
            layer[block * size : (block + 1) * size] for layer, size in zip(self.layers, self._block_bytes, strict=True)
        ]

    def memory(self, layout: Layout) -> Memory:
        """The pool for a transport."""
        regions = [
            Region(self.address + offset, size, size, self.blocks)
            for offset, size in zip(self._offsets, self._block_bytes, strict=False)
        ]
        return Memory(layout, regions, self.address + self._offsets[-1], self)

    def reader_fd(self) -> int:
        """A descriptor to give away: its own open file, for reading only. The caller closes it."""
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Close the file; the memory goes with the last view of it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def address_of(buffer: mmap.mmap) -> int:
    """Where a mapping, writable or not, begins."""
    return int(np.frombuffer(buffer, dtype=np.uint8).ctypes.data)

"""How many KV blocks: from a memory budget, or from what is free; and their allocation.

The pool gets a quarter of the memory that is free after the weights are loaded (the rest is for activations, page
cache and the other processes of a shared machine), but no more than all slots could use, and at least one context.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tokenrelay.base.errors import ConfigError
from tokenrelay.base.logging import get_logger

log = get_logger("memory")

FREE_FRACTION = 0.25
FREE_FRACTION_GPU = 0.9  # a device of one's own
SHARED_BLOCKS_FACTOR = 2  # room for cached prefixes beside what running sequences hold
BLOCKS_MAX = 1 << 24
CACHE_LINE = 64
HOST_FACTOR = 2  # of the pool: a smaller host tier holds little that the device does not (docs/scheduler.md)


class KvLayout(Protocol):
    """The cache of one layer, as far as sizes go (kernels/layout.py)."""

    @property
    def block_tokens(self) -> int:
        """Tokens per block."""

    def shape(self, blocks: int) -> tuple[int, ...]:
        """Of the tensor that holds so many blocks."""

    def bytes_per_block(self, dtype: torch.dtype) -> int:
        """Of one layer."""


@dataclass(frozen=True, slots=True)
class Pool:
    """The KV pool of a worker."""

    blocks: int
    context_tokens: int  # of one sequence, at most
    bytes: int  # all layers, in this process
    parts: int = 1  # of one size: the scheduler's, where ranks have KV of different sequences
    whole: bool = True  # this process has memory for all parts, else for one

    @property
    def own_blocks(self) -> int:
        """Blocks that this process has memory for."""
        return self.blocks if self.whole else self.blocks // self.parts


def plan_pool(
    layout: KvLayout,
    layers: int,
    dtype: torch.dtype,
    *,
    slots: int,
    context_tokens: int,
    context_asked: bool,
    kv_memory_bytes: int | None = None,
    kv_sharers: int = 1,
    blocks: int | None = None,
    device: torch.device | None = None,
    parts: int = 1,
    whole: bool = True,
) -> Pool:
    """Size the pool. `blocks` decides if given, else `kv_memory_bytes`, else what is free, by `kv_sharers`.

    The pool is divided into `parts`, each in a process of its own; not `whole`: this one has memory for one of them
    only, and bytes say how much that is. A sequence's KV is in one part. Where one whole context does not fit, the
    context is lowered, or refused if it was asked for (`context_asked`).
    Raises ConfigError that says how much is needed and how much there is.
    """
    block_tokens = layout.block_tokens
    block_bytes = layers * layout.bytes_per_block(dtype)
    if blocks is None:
        if kv_memory_bytes is None:
            budget, origin = default_budget(device or torch.device("cpu")) // kv_sharers, "of the memory that is free"
        else:
            budget, origin = kv_memory_bytes, "of --kv-memory"
        part_blocks = budget // block_bytes // (parts if whole else 1)
        blocks = min(part_blocks * parts, BLOCKS_MAX // parts * parts)
        if kv_memory_bytes is None:
            context_blocks = -(-context_tokens // block_tokens)
            most = SHARED_BLOCKS_FACTOR * slots * context_blocks
            blocks = min(blocks, -(-most // parts) * parts)
    else:
        if blocks % parts:
            raise ConfigError(f"--blocks is {blocks}, and {parts} ranks along dp divide them: give a multiple of that")
        budget, origin = blocks * block_bytes // (1 if whole else parts), "of --blocks"
    if blocks < 2 * parts:
        many = f" of each of {parts} parts" if parts > 1 else ""
        raise ConfigError(f"two KV blocks{many} of {block_bytes} bytes do not fit in {budget} bytes {origin}")
    capacity = blocks // parts * block_tokens
    if capacity < context_tokens:
        if context_asked:
            needed = -(-context_tokens // block_tokens) * block_bytes
            raise ConfigError(
                f"a context of {context_tokens} tokens needs {needed} bytes of KV, and there are {budget} {origin}"
            )
        log.warning("context lowered to what the KV pool holds", model_tokens=context_tokens, context_tokens=capacity)
        context_tokens = capacity
    pool = Pool(blocks, context_tokens, 0, parts, whole)
    return replace(pool, bytes=pool.own_blocks * block_bytes)


def plan_host(
    layout: KvLayout, layers: int, dtype: torch.dtype, memory_bytes: int, pool_blocks: int, device: torch.device
) -> int:
    """Blocks of the host tier in so many bytes; 0 bytes: there is none. Raises ConfigError when they are not there."""
    if memory_bytes == 0:
        return 0
    block_bytes = layers * layout.bytes_per_block(dtype)
    blocks = min(memory_bytes // block_bytes, BLOCKS_MAX)
    if blocks < 1:
        raise ConfigError(f"a KV block of {block_bytes} bytes does not fit in the {memory_bytes} of --host-cache-gib")
    if memory_bytes > (free := available_bytes()):
        raise ConfigError(f"--host-cache-gib asks for {memory_bytes} bytes of host memory, and {free} are free")
    if device.type == "cpu":
        log.warning("a host tier gains little on a CPU: its KV pool is in the same memory", host_blocks=blocks)
    if blocks < HOST_FACTOR * pool_blocks:
        log.warning("a host tier gains little unless it is several times the pool", host=blocks, pool=pool_blocks)
    return blocks


def allocate_caches(
    layout: KvLayout, layers: int, pool: Pool, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> list[Tensor]:
    """One zeroed region per layer. On a CPU pages are taken when they are first touched. Raises ConfigError."""
    try:
        shape = layout.shape(pool.own_blocks)
        if torch.device(device).type == "cpu":
            return [_zeros(shape, dtype) for _ in range(layers)]
        return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
    except (RuntimeError, MemoryError) as error:
        raise ConfigError(f"cannot allocate {pool.bytes} bytes for {pool.blocks} KV blocks: {error}") from error


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeroed memory, 64-byte aligned, that the system gives page by page: torch.zeros writes all of it at once."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + CACHE_LINE, dtype=np.uint8)
    first = -memory.ctypes.data % CACHE_LINE
    return torch.from_numpy(memory[first : first + size]).view(dtype).view(shape)


def wrap_caches(layers: Sequence[memoryview], layout: KvLayout, pool: Pool, dtype: torch.dtype) -> list[Tensor]:
    """The caches over memory of somebody else's (bytes, zeroed, one buffer per layer), which they keep alive."""
    return [torch.frombuffer(layer, dtype=dtype).view(layout.shape(pool.blocks)) for layer in layers]


def default_budget(device: torch.device) -> int:
    """Bytes for KV when nobody says how many."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * FREE_FRACTION_GPU)
    return int(available_bytes() * FREE_FRACTION)


def available_bytes(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory this process may still take: MemAvailable (proc(5)), less where a control group says less (cgroups(7))."""
    available = 4 << 30  # where the kernel does not say
    try:
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    except OSError:
        return available
    try:
        limit, used = (cgroup / "memory.max").read_text().strip(), int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):
        return available
    return available if limit == "max" else min(available, max(0, int(limit) - used))

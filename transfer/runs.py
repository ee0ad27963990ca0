"""From blocks to contiguous runs: neighbours in both pools become one copy.

runs = coalesce([Span(0, 27, remote_blocks, local_blocks)], layers=27, remote_blocks=4096, local_blocks=1024)
runs.blocks.sum() / len(runs)    # blocks per descriptor
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tokenrelay.transfer.memory import Blocks

Array = npt.NDArray[np.int64]
RUNS_MAX = 1 << 20  # of one pull: 256 k blocks in 4 layers without a neighbour


@dataclass(frozen=True, slots=True)
class Span:
    """Extents to pull: in every layer of [layer_start, layer_end), `remote_blocks[n]` goes to `local_blocks[n]`."""

    layer_start: int
    layer_end: int
    remote_blocks: Blocks
    local_blocks: Blocks


@dataclass(frozen=True, slots=True)
class Runs:
    """`blocks[n]` neighbours from `remote[n]` on go to `local[n]` on, in layer `layers[n]`. All int64 [n], by layer."""

    layers: Array
    remote: Array
    local: Array
    blocks: Array

    def __len__(self) -> int:
        return len(self.layers)

    def bytes(self, block_bytes: Sequence[int]) -> int:
        """To be moved."""
        return int((np.asarray(block_bytes, dtype=np.int64)[self.layers] * self.blocks).sum())


def coalesce(spans: Sequence[Span], *, layers: int, remote_blocks: int, local_blocks: int) -> Runs:
    """Longest runs. Raises ValueError that names the field for extents that are not there or are written twice."""
    pieces: list[tuple[Array, Array, Array, Array]] = []
    total = 0
    for span in spans:
        if not 0 <= span.layer_start <= span.layer_end <= layers:
            raise ValueError(f"layers [{span.layer_start}, {span.layer_end}): there are [0, {layers})")
        remote, local = (
            _blocks("remote_blocks", span.remote_blocks, remote_blocks),
            _blocks("local_blocks", span.local_blocks, local_blocks),
        )
        if len(remote) != len(local):
            raise ValueError(f"{len(remote)} remote_blocks and {len(local)} local_blocks: expected as many")
        depth = span.layer_end - span.layer_start
        if not len(remote) or not depth:
            continue
        if len(np.unique(local)) != len(local):
            raise ValueError("local_blocks names a block twice")
        starts, remote, local, counts = _runs(remote, local)
        total += len(starts) * depth
        if total > RUNS_MAX:
            raise ValueError(f"more than {RUNS_MAX} runs in one pull: ask for less at once")
        numbers = np.repeat(np.arange(span.layer_start, span.layer_end, dtype=np.int64), len(starts))
        pieces.append((numbers, np.tile(remote, depth), np.tile(local, depth), np.tile(counts, depth)))
    if not pieces:
        nothing = np.empty(0, dtype=np.int64)
        return Runs(nothing, nothing, nothing, nothing)
    return Runs(*(np.concatenate(column) for column in zip(*pieces, strict=True)))


def _runs(remote: Array, local: Array) -> tuple[Array, Array, Array, Array]:
    """(index of a run's first pair, its remote block, its local block, its length), in the order of remote blocks."""
    order = np.argsort(remote, kind="stable")
    remote, local = remote[order], local[order]
    breaks = np.flatnonzero((np.diff(remote) != 1) | (np.diff(local) != 1)) + 1
    starts = np.concatenate((np.zeros(1, dtype=np.int64), breaks))
    ends = np.concatenate((breaks, np.array([len(remote)], dtype=np.int64)))
    return starts, remote[starts], local[starts], ends - starts


def _blocks(name: str, blocks: Blocks, limit: int) -> Array:
    array = np.asarray(blocks, dtype=np.int64)
    if array.ndim != 1:
        raise ValueError(f"{name} has {array.ndim} dimensions, expected 1")
    if len(array) and (array.min() < 0 or array.max() >= limit):
        raise ValueError(f"{name} has a block outside [0, {limit})")
    return array


def bounded(runs: Runs, block_bytes: Sequence[int], run_bytes: int) -> Runs:
    """The same, with no run of more than about `run_bytes` (a single block may be)."""
    most = np.maximum(1, run_bytes // np.asarray(block_bytes, dtype=np.int64))[runs.layers]
    pieces = -(-runs.blocks // most)
    if pieces.max(initial=1) == 1:
        return runs
    most = np.repeat(most, pieces)
    first = np.repeat(np.cumsum(pieces) - pieces, pieces)
    offsets = (np.arange(len(most), dtype=np.int64) - first) * most
    left = np.repeat(runs.blocks, pieces) - offsets
    layers, remote, local = (np.repeat(column, pieces) for column in (runs.layers, runs.remote, runs.local))
    return Runs(layers, remote + offsets, local + offsets, np.minimum(left, most))


def split(runs: Runs, block_bytes: Sequence[int], chunk_bytes: int) -> list[tuple[int, int]]:
    """Index ranges [start, end) of runs with about `chunk_bytes` each: what is moved without a look around."""
    ends = np.cumsum(np.asarray(block_bytes, dtype=np.int64)[runs.layers] * runs.blocks)
    marks = np.flatnonzero(np.diff(ends // chunk_bytes, prepend=0)) + 1
    edges = sorted({0, *marks.tolist(), len(runs)})
    return list(itertools.pairwise(edges))

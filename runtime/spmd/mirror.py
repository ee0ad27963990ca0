"""One rank's layout of the KV pool beside what the ranks hold, so that workers of different widths exchange KV.

A worker of a fleet shows its peers, and the block tier, a pool as one rank has it: latents once, all heads of a block
side by side. The leader keeps it, and the engine, transfers and the ledger know no other. With `tp` each rank has heads
of its own, so after every step the ranks send the leader what they wrote (`collect`), and it goes into the pool before
anybody is told of it. What a transfer wrote into the pool the ranks lack: before a step reads a block whose generation
they have not seen, the leader sends them their heads of it (`spread`). A generation is bumped when a block is taken, so
nobody has to say which blocks were written from outside.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokenrelay.kernels.batch import AttentionBatch
from tokenrelay.kernels.layout import GqaLayout, MlaLayout
from tokenrelay.runtime.placement import AXES, Mesh
from tokenrelay.runtime.spmd.comm import Comm


class Unseen:
    """Which blocks the ranks hold as they are in the pool. The leader's."""

    def __init__(self, generations: npt.NDArray[np.uint64], block_tokens: int) -> None:
        """`generations` [blocks]: the scheduler's words, which change when a block is taken for something else."""
        self._generations = generations
        self._block_tokens = block_tokens
        self._seen = np.full(len(generations), np.iinfo(np.uint64).max, dtype=np.uint64)

    def choose(self, batch: AttentionBatch) -> list[int]:
        """The blocks that the step reads and the ranks lack; afterwards they have them, and what the step writes."""
        table = batch.block_table[batch.slots.long()].cpu().numpy()
        starts, ends = batch.starts.tolist(), (batch.starts + batch.lengths).tolist()
        size = self._block_tokens
        lacking: set[int] = set()
        for row, start in enumerate(starts):
            read = table[row, : -(-start // size)]
            lacking.update(read[self._seen[read] != self._generations[read]].tolist())
        for row, end in enumerate(ends):
            used = table[row, : -(-end // size)]
            self._seen[used] = self._generations[used]
        return sorted(lacking)


class Mirror:
    """One rank's part in `spread` and `collect`. All ranks of the mesh call them together."""

    def __init__(self, comm: Comm, mesh: Mesh, rank: int, layout: GqaLayout | MlaLayout) -> None:
        """`layout` of this rank's caches."""
        self._comm = comm
        self._mesh = mesh
        self._rank = rank
        self._at = mesh.coordinates(rank)
        self._layout = layout
        self._all = tuple(axis for axis in AXES if mesh.size(axis) > 1)
        comm.connect(self._all)
        if mesh.size("tp") > 1:
            comm.connect(("tp",))

    @property
    def _heads(self) -> int:
        """Of a rank; 0: latents, which are whole on each."""
        return self._layout.kv_heads if isinstance(self._layout, GqaLayout) else 0

    def spread(self, blocks: list[int], caches: list[Tensor], pool: list[Tensor]) -> None:
        """`blocks` of the leader's `pool` to every rank's `caches`; followers have no pool."""
        if not blocks:
            return
        index = torch.tensor(blocks)
        if self._rank:
            like = torch.empty((len(caches), len(blocks), *caches[0].shape[1:]), dtype=caches[0].dtype)
            for cache, part in zip(caches, self._comm.receive_in(self._all, 0, like), strict=True):
                cache[index] = part
            return
        whole = torch.stack([layer[index] for layer in pool])  # [layers, blocks, …]
        for rank in range(1, self._mesh.ranks):
            self._comm.send_in(self._all, rank, self._part(whole, self._mesh.coordinates(rank)["tp"]))
        if caches[0] is not pool[0]:
            for cache, part in zip(caches, self._part(whole, 0), strict=True):
                cache[index] = part

    def _part(self, whole: Tensor, tp: int) -> Tensor:
        """[layers, blocks, 2, heads, …] -> one rank's heads; latents as they are."""
        return whole.narrow(3, tp * self._heads, self._heads) if self._heads else whole

    def collect(self, slots: Tensor, caches: list[Tensor], pool: list[Tensor]) -> None:
        """What the ranks wrote at `slots` (int64 [t] of the cache) into the leader's `pool`."""
        if not self._heads or self._mesh.size("tp") == 1 or any(self._at[a] for a in self._at if a != "tp"):
            return
        size = self._layout.block_tokens
        blocks, places = slots // size, slots % size
        mine = torch.stack([cache[blocks, :, :, places] for cache in caches])  # [layers, t, 2, heads, head_dim]
        if self._rank:
            self._comm.send_in(("tp",), 0, mine)
            return
        parts = [mine]
        parts += [self._comm.receive_in(("tp",), n, torch.empty_like(mine)) for n in range(1, self._mesh.size("tp"))]
        for layer, written in zip(pool, torch.cat(parts, 3), strict=True):
            layer[blocks, :, :, places] = written

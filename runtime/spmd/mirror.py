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
from tokenrelay.kernels.layout import GqaLayout, KvLayout
from tokenrelay.runtime.placement import STAGES, Mesh
from tokenrelay.runtime.placement.mesh import MESH_AXES
from tokenrelay.runtime.placement.stages import stage_layers
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

    def __init__(self, comm: Comm, mesh: Mesh, rank: int, layout: KvLayout, layers: int) -> None:
        """`layout` of this rank's caches; `layers` of the whole model."""
        self._comm = comm
        self._mesh = mesh
        self._rank = rank
        self._layout = layout
        self._heads = layout.kv_heads if isinstance(layout, GqaLayout) else 0  # of a rank; 0: latents, whole on each
        self._stages = [stage_layers(layers, stage, mesh.size(STAGES)) for stage in range(mesh.size(STAGES))]
        self._all = tuple(axis for axis in MESH_AXES if mesh.size(axis) > 1)
        comm.connect(self._all)
        self._keepers = [other for other in range(mesh.ranks) if self._keeps(mesh.coordinates(other))]
        self.in_place = mesh.size("dp") == 1 and (not self._heads or mesh.size("tp") == 1)
        """The leader's caches are the first layers of the pool."""

    def _keeps(self, at: dict[str, int]) -> bool:
        """Whether the leader hears from the rank there what it wrote; the others have the same as one of these."""
        return not at["cp"] and not at["ep"] and (bool(self._heads) or not at["tp"])

    def _layers(self, pool: list[Tensor], rank: int) -> list[Tensor]:
        held = self._stages[self._mesh.coordinates(rank)[STAGES]]
        return pool[held.start : held.stop]

    def spread(self, blocks: list[int], part_blocks: int, caches: list[Tensor], pool: list[Tensor]) -> None:
        """`blocks` of the leader's `pool` to the `caches` of the ranks that lack them; followers have no pool."""
        for rank in range(self._mesh.ranks):
            home = self._mesh.coordinates(rank)["dp"] * part_blocks
            own = torch.tensor([block for block in blocks if home <= block < home + part_blocks], dtype=torch.int64)
            if not len(own) or (self._rank and rank != self._rank) or (not rank and self.in_place):
                continue
            if self._rank:
                like = torch.empty((len(caches), len(own), *caches[0].shape[1:]), dtype=caches[0].dtype)
                came = self._comm.receive_in(self._all, 0, like)
            else:
                came = torch.stack([layer[own] for layer in self._layers(pool, rank)])  # [layers, blocks, …]
                if self._heads:
                    came = came.narrow(3, self._mesh.coordinates(rank)["tp"] * self._heads, self._heads)
                if rank:
                    self._comm.send_in(self._all, rank, came)
                    continue
            for cache, part in zip(caches, came, strict=True):
                cache[own - home] = part

    def collect(self, slots: Tensor, part_blocks: int, caches: list[Tensor], pool: list[Tensor]) -> None:
        """What the ranks wrote at `slots` (int64 [t] of the pool) into the leader's `pool`."""
        size = self._layout.block_tokens
        blocks, places = slots // size, slots % size
        homes = blocks // part_blocks
        for rank in self._keepers:
            at = self._mesh.coordinates(rank)
            mine = torch.nonzero(homes == at["dp"]).flatten()
            if not len(mine) or (self._rank and rank != self._rank) or (not rank and self.in_place):
                continue
            held, inside = blocks[mine], places[mine]
            if rank == self._rank:
                came = torch.stack([_written(cache, held - at["dp"] * part_blocks, inside) for cache in caches])
                if rank:
                    self._comm.send_in(self._all, 0, came)
                    continue
            else:
                shape = _written(pool[0], held, inside).shape  # [t, 2, heads, …], or [t, width]
                heads = (shape[0], 2, self._heads, shape[3]) if self._heads else shape
                like = torch.empty((len(self._layers(pool, rank)), *heads), dtype=pool[0].dtype)
                came = self._comm.receive_in(self._all, rank, like)
            first = at["tp"] * self._heads
            for layer, part in zip(self._layers(pool, rank), came, strict=True):
                if self._heads:
                    layer[:, :, first : first + self._heads][held, :, :, inside] = part
                else:
                    layer[held, inside] = part


def _written(cache: Tensor, blocks: Tensor, places: Tensor) -> Tensor:
    """What a cache has at each token: [t, 2, heads, head_dim], or [t, width] of latents."""
    return cache[blocks, places] if cache.dim() == 3 else cache[blocks, :, :, places]

"""Which ranks along dp hold which KV blocks, and on which of them each row of a step is computed. The leader's.

The scheduler knows one pool of blocks; every rank along dp has room for all of them and fills those of its own
sequences. A row stays where its last block is. A prefix hit brings it to where the prefix was computed; where blocks of
one prefix lie on several ranks, those that the row's home lacks are copied there before the step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tokenrelay.kernels.batch import AttentionBatch

DP_MAX = 64  # bits of a mask


@dataclass(frozen=True, slots=True)
class Copy:
    """Blocks that go from one place along dp to another before the step."""

    source: int
    target: int
    blocks: tuple[int, ...]


class Homes:
    """The holders of each block: bit i of a mask for the rank at place i along dp."""

    def __init__(self, places: int, block_tokens: int) -> None:
        assert 1 <= places <= DP_MAX
        self._places = places
        self._block_tokens = block_tokens
        self._holders: npt.NDArray[np.uint64] = np.zeros(0, np.uint64)

    def allocate(self, blocks: int) -> None:
        """Nobody holds anything yet. Blocks that were filled from elsewhere count as the first rank's."""
        self._holders = np.zeros(blocks, np.uint64)

    def choose(self, batch: AttentionBatch) -> tuple[list[int], list[Copy]]:
        """The home of each row, and the copies that its blocks need; afterwards the step's writes are known."""
        table = batch.block_table[batch.slots.long()].cpu().numpy()
        starts, lengths = batch.starts.tolist(), batch.lengths.tolist()
        load = [0] * self._places
        homes = [-1] * len(starts)
        for row, start in enumerate(starts):
            if start:
                holders = self._mask(table[row, (start - 1) // self._block_tokens])
                homes[row] = min((p for p in range(self._places) if holders >> p & 1), key=load.__getitem__)
                load[homes[row]] += start + lengths[row]
        for row, start in enumerate(starts):
            if not start:
                homes[row] = min(range(self._places), key=load.__getitem__)
                load[homes[row]] += lengths[row]
        copies: dict[tuple[int, int], list[int]] = {}
        for row, home in enumerate(homes):
            for block in table[row, : -(-starts[row] // self._block_tokens)].tolist():
                holders = self._mask(block)
                if not holders >> home & 1:
                    source = (holders & -holders).bit_length() - 1
                    copies.setdefault((source, home), []).append(block)
                    self._holders[block] = holders | 1 << home
        for row, home in enumerate(homes):
            first = starts[row] // self._block_tokens
            end = -(-(starts[row] + lengths[row]) // self._block_tokens)
            self._holders[table[row, first:end]] = 1 << home
        return homes, [Copy(source, target, tuple(blocks)) for (source, target), blocks in copies.items()]

    def _mask(self, block: int) -> int:
        return int(self._holders[block]) or 1

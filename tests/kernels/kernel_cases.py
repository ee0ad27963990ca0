"""Random paged batches with their unpaged truth, the paths this machine can run, and comparisons.

Cache slots that no sequence owns are NaN: a kernel that reads one shows it.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tokenrelay.kernels import registry
from tokenrelay.kernels.batch import AttentionBatch
from tokenrelay.kernels.layout import GqaLayout, MlaLayout

# Relative to the largest true value. bfloat16 has 8 bits: its inputs are exact in the oracle, so what is left is one
# rounding of the result, or three where keys, values or weights are rounded on the way.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.2e-2}


def paths(op: str, dtype: str = "float32") -> list[str]:
    """The native paths of `op` that run on this machine's processor; tests/triton has the others."""
    found = [k.path for k in registry.kernels(op) if k.source == "tokenrelay" and not k.unmet("cpu", dtype, {})]
    return [path for path in found if path.startswith("cpu/")]


def each_path(op: str, *, reference: bool = True) -> pytest.MarkDecorator:
    """Parametrize (path, dtype) over all that runs here."""
    cases = [
        pytest.param(path, dtype, id=f"{path}-{str(dtype)[6:]}")
        for dtype in (torch.float32, torch.bfloat16)
        for path in (["ref/torch"] if reference else []) + paths(op, str(dtype)[6:])
    ]
    return pytest.mark.parametrize(("path", "dtype"), cases)


def close(actual: Tensor, expected: Tensor, factor: float = 1.0) -> None:
    """`actual` is `expected` (float64) to the tolerance of its type."""
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return
    limit = TOLERANCE[actual.dtype] * factor * max(1e-3, float(expected.abs().max()))
    error = float((actual.double() - expected).abs().max())
    assert error <= limit, f"off by {error:.3g}, at most {limit:.3g}"  # a NaN fails too


@dataclass
class Case:
    """A batch, and for each row its context's entries, unpaged."""

    batch: AttentionBatch
    cache: Tensor
    contexts: list[Tensor]  # MLA: [c, rank + rope]; GQA: [2, hk, c, hd]

    @property
    def rows(self) -> int:
        """Rows of the step."""
        return len(self.contexts)

    @property
    def tokens(self) -> int:
        """Tokens of the step."""
        return int(self.batch.offsets[-1])

    def extent(self, row: int) -> tuple[int, int, int]:
        """start, length, first token in the step."""
        return int(self.batch.starts[row]), int(self.batch.lengths[row]), int(self.batch.offsets[row])


def make_batch(rows: list[tuple[int, int]], block_tokens: int, share: int = 0) -> tuple[AttentionBatch, int]:
    """Rows of (start, length), those of length 1 at the front being decodes; each gets blocks of its own in random
    order, except that the first `share` blocks of all rows are the same. Also the number of blocks."""
    decodes = 0
    while decodes < len(rows) and rows[decodes][1] == 1:
        decodes += 1
    widths = [-(-(start + length) // block_tokens) for start, length in rows]
    blocks_max = max([*widths, 1]) + 1
    total = share + sum(widths) + 3
    pool = torch.randperm(total).tolist()
    shared, pool = pool[:share], pool[share:]
    slots = torch.randperm(len(rows) + 2)[: len(rows)].to(torch.int32)
    table = torch.full((len(rows) + 2, blocks_max), -1, dtype=torch.int32)
    positions, cache_slots, offsets = [], [], [0]
    for slot, width, (start, length) in zip(slots.tolist(), widths, rows, strict=True):
        mine = shared[: min(width, start // block_tokens)]
        mine += [pool.pop() for _ in range(width - len(mine))]
        table[slot, :width] = torch.tensor(mine, dtype=torch.int32)
        own = range(start, start + length)
        positions += own
        cache_slots += [mine[p // block_tokens] * block_tokens + p % block_tokens for p in own]
        offsets.append(offsets[-1] + length)
    batch = AttentionBatch(
        block_table=table,
        slots=slots,
        starts=torch.tensor([s for s, _ in rows], dtype=torch.int32),
        lengths=torch.tensor([n for _, n in rows], dtype=torch.int32),
        offsets=torch.tensor(offsets, dtype=torch.int32),
        positions=torch.tensor(positions, dtype=torch.int64),
        cache_slots=torch.tensor(cache_slots, dtype=torch.int64),
        decodes=decodes,
        context_max=max([s + n for s, n in rows], default=0),
    )
    return batch, total


def mla_case(rows: list[tuple[int, int]], layout: MlaLayout, dtype: torch.dtype, share: int = 0) -> Case:
    """A batch over an MLA cache whose contexts are all written."""
    batch, total = make_batch(rows, layout.block_tokens, share)
    cache = torch.full(layout.shape(total), float("nan"), dtype=dtype)
    contexts = []
    for row, (start, length) in enumerate(rows):
        where = _positions(batch, row, start + length, layout.block_tokens)
        flat = cache.view(-1, layout.width)
        fresh = flat[where].isnan().any(-1)  # what another row shares stays
        flat[where[fresh]] = torch.randn(int(fresh.sum()), layout.width).to(dtype)
        contexts.append(where)
    return Case(batch, cache, [cache.view(-1, layout.width)[where].double() for where in contexts])


def gqa_case(rows: list[tuple[int, int]], layout: GqaLayout, dtype: torch.dtype, share: int = 0) -> Case:
    """A batch over a GQA cache whose contexts are all written."""
    batch, total = make_batch(rows, layout.block_tokens, share)
    cache = torch.full(layout.shape(total), float("nan"), dtype=dtype)
    places = [_positions(batch, row, s + n, layout.block_tokens) for row, (s, n) in enumerate(rows)]
    for where in places:
        for place in where.tolist():
            block, offset = divmod(place, layout.block_tokens)
            if cache[block, 0, 0, offset, 0].isnan():
                cache[block, :, :, offset] = torch.randn(2, layout.kv_heads, layout.head_dim).to(dtype)
    contexts = [
        cache[where // layout.block_tokens, :, :, where % layout.block_tokens].permute(1, 2, 0, 3).double()
        for where in places
    ]
    return Case(batch, cache, contexts)


def _positions(batch: AttentionBatch, row: int, context: int, block_tokens: int) -> Tensor:
    at = torch.arange(context)
    return batch.block_table[int(batch.slots[row])].long()[at // block_tokens] * block_tokens + at % block_tokens


def dense_attention(q: Tensor, k: Tensor, v: Tensor, start: int, scale: float) -> Tensor:
    """The oracle: q [t, h, dk], k [h, c, dk], v [h, c, dv] in float64, token i at position start + i; no softmax of
    torch, no batching, one token and head after the other."""
    out = torch.empty(q.shape[0], q.shape[1], v.shape[2], dtype=torch.float64)
    for i in range(q.shape[0]):
        for h in range(q.shape[1]):
            scores = (k[h, : start + i + 1] @ q[i, h]) * scale
            weights = (scores - scores.max()).exp()
            out[i, h] = weights @ v[h, : start + i + 1] / weights.sum()
    return out


def rounded(x: Tensor) -> Tensor:
    """Activations as the integer kernels round them, in float64: signed bytes, scaled by the largest of each 128."""
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % 128)).unflatten(-1, (-1, 128))
    largest = padded.abs().amax(dim=-1, keepdim=True)
    inverse = torch.full_like(largest, 127) / largest  # torch takes 127 / largest for 127 * (1 / largest)
    whole = (padded * torch.where(largest > 0, inverse, 0)).round()  # ties to even, as the kernels do
    return (whole.double() * (largest / 127).double()).flatten(-2)[:, : x.shape[1]]

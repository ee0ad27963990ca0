"""Token embedding and the output head, which may share one table."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenrelay.kernels import ops
from tokenrelay.kernels.packed import PackedWeight, pack, packs_well
from tokenrelay.kernels.quantized import QuantizedWeight, WeightForm, quantize
from tokenrelay.runtime.layers.module import Module
from tokenrelay.runtime.layers.sources import WeightPart, WeightSource, parameter
from tokenrelay.runtime.placement import Boundary, Partial, Port, Shard


class Embedding(Module):
    """Token ids -> rows of a table [vocab, d]."""

    def __init__(self, name: str, vocab: int, width: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.name = name
        self.weight = parameter(vocab, width, dtype=dtype)
        # Cut by vocabulary: a rank gives zeros for ids that are not its own, so the output is a sum.
        self.boundary = Boundary(
            {"token_ids": Port((None,))},
            {"y": Port((None, width), {"tp": Partial()})},
            {"weight": {"tp": Shard(0)}},
        )

    def sources(self, prefix: str) -> Iterator[WeightSource]:
        """`<prefix><name>.weight`."""
        yield WeightSource(f"{prefix}{self.name}.weight", tuple(self.weight.shape), (WeightPart(self, "weight"),))

    def forward(self, token_ids: Tensor) -> Tensor:
        """int64 [t] -> [t, d]."""
        return F.embedding(token_ids, self.weight)


class Head(Module):
    """[s, d] -> float32 logits [s, vocab]. With `tied` it has no table of its own and uses the embedding's."""

    def __init__(self, name: str, vocab: int, width: int, *, tied: Embedding | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.name = name
        self.width = width
        self.vocab = vocab
        self._tied = [tied] if tied is not None else []  # in a list: not a child, so that it is counted and loaded once
        self.quantized: QuantizedWeight | None = None  # in the place of the table, once `quantize` was called
        self.packed: PackedWeight | None = None  # in the place of either, once `pack` was called
        if tied is None:
            self.weight = parameter(vocab, width, dtype=dtype)
        self.boundary = Boundary(
            {"x": Port((None, width))},
            {"y": Port((None, vocab), {"tp": Shard(-1)})},
            {} if tied is not None else {"weight": {"tp": Shard(0)}},
        )

    @property
    def table(self) -> Tensor:
        """[vocab, d], its own or the embedding's, while it is neither quantized nor packed."""
        return self._tied[0].weight if self._tied else self.weight

    @property
    def tied(self) -> bool:
        """Whether the embedding's table is used."""
        return bool(self._tied)

    def sources(self, prefix: str) -> Iterator[WeightSource]:
        """`<prefix><name>.weight`, or nothing when tied."""
        if not self._tied:
            yield WeightSource(f"{prefix}{self.name}.weight", (self.vocab, self.width), (WeightPart(self, "weight"),))

    def forward(self, x: Tensor) -> Tensor:
        """[s, d] -> float32 [s, vocab]."""
        if self.packed is not None:
            return ops.packed_linear(x, self.packed, wide=True)
        if self.quantized is not None:
            return ops.quantized_linear(x, self.quantized, wide=True)
        return ops.linear(x, self.table, wide=True)

    def quantize(self, form: WeightForm) -> None:
        """Keep the table as bytes from now on, also where the form has nibbles: logits are worth it."""
        self.quantized = quantize(self._tied[0].weight if self._tied else self.weight, bits=8)
        if not self._tied:
            del self.weight

    def pack(self) -> None:
        """As `Linear.pack`. A tied table is kept twice: the embedding reads rows."""
        table = self._tied[0].weight if self._tied else getattr(self, "weight", None)
        weight = table if self.quantized is None else self.quantized
        if weight is not None and packs_well(weight):
            self.packed = pack(weight)
            if self.quantized is None and not self._tied:
                del self.weight
            self.quantized = None

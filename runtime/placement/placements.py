"""How one tensor lies along one mesh axis, in the words of torch.distributed.tensor (DTensor).

Plain values of our own: importing torch.distributed for three names would cost every start-up, and these are data only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Shard:
    """Each rank of the axis holds an equal part of dimension `dim` (negative counts from the end)."""

    dim: int


@dataclass(frozen=True)
class Replicate:
    """Each rank of the axis holds the whole tensor."""


@dataclass(frozen=True)
class Partial:
    """Each rank of the axis holds a term; the tensor is their reduction by `op`."""

    op: str = "sum"


Placement = Shard | Replicate | Partial
# Mesh axis -> placement. An axis that is not named is Replicate().
Layout = Mapping[str, Placement]

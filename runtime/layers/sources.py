"""Which checkpoint tensor fills which parameter: data beside the modules, read by runtime/weights.

A module that owns parameters has `sources(prefix)`, which yields one `WeightSource` for each tensor that a checkpoint
holds for it. Fused parameters (q, k and v stacked; all experts of a layer in one tensor) are filled part by part, so
loading never holds a second copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import nn

Index = tuple[int | slice, ...]


@dataclass(frozen=True)
class WeightPart:
    """`module.<parameter>[at] = source.view(view)[take]`."""

    module: nn.Module
    parameter: str
    at: Index = ()
    take: Index = ()


@dataclass(frozen=True)
class WeightSource:
    """A tensor of a checkpoint: its name, the shape it must have, and the parameters that it fills."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[WeightPart, ...]
    view: tuple[int, ...] | None = None  # None: the parts index the tensor as it is


@runtime_checkable
class HasSources(Protocol):
    """A module with parameters of its own."""

    def sources(self, prefix: str) -> Iterator[WeightSource]:
        """The checkpoint tensors for this module, named below `prefix` (which ends with a dot or is empty)."""
        ...


def parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """An uninitialised parameter that never needs a gradient, on the device of the context."""
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)

"""Root mean square normalisation (arXiv:1910.07467)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tokenrelay.kernels import ops
from tokenrelay.runtime.layers.module import Module
from tokenrelay.runtime.layers.sources import WeightPart, WeightSource, parameter
from tokenrelay.runtime.placement import Boundary, Port


class RmsNorm(Module):
    """x / rms(x) * weight over the last dimension. `name` is the checkpoint's word for it."""

    def __init__(self, name: str, width: int, eps: float, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.name = name
        self.eps = eps
        self.weight = parameter(width, dtype=dtype)
        port = Port((None, width))
        self.boundary = Boundary({"x": port}, {"y": port}, {"weight": {}}, tokenwise=True)

    def sources(self, prefix: str) -> Iterator[WeightSource]:
        """`<prefix><name>.weight`."""
        yield WeightSource(f"{prefix}{self.name}.weight", tuple(self.weight.shape), (WeightPart(self, "weight"),))

    def forward(self, x: Tensor) -> Tensor:
        """[t, d] -> [t, d]."""
        return ops.rms_norm(x, self.weight, self.eps)


class AddRmsNorm(RmsNorm):
    """Adds to the residual stream, then normalises: what stands between two halves of a decoder layer."""

    def __init__(self, name: str, width: int, eps: float, *, dtype: torch.dtype) -> None:
        super().__init__(name, width, eps, dtype=dtype)
        port = Port((None, width))
        self.boundary = Boundary(
            {"x": port, "residual": port}, {"y": port, "residual": port}, {"weight": {}}, tokenwise=True
        )

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """([t, d], [t, d]) -> (norm of the sum, the sum)."""
        return ops.add_rms_norm(x, residual, self.weight, self.eps)

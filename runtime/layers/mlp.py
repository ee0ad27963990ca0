"""The gated feed-forward layer (SwiGLU, arXiv:2002.05202)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tokenrelay.kernels import ops
from tokenrelay.runtime.layers.linear import Linear, Split
from tokenrelay.runtime.layers.module import Module
from tokenrelay.runtime.layers.sources import WeightSource
from tokenrelay.runtime.placement import TOKEN_AXES, Boundary, Partial, Port, Replicate, Shard, edges


class Activation(Module):
    """silu(gate) * up: [t, 2f] -> [t, f]."""

    def __init__(self, width: int, axes: tuple[str, ...]) -> None:
        super().__init__()
        cut = dict.fromkeys(axes, Shard(-1))
        self.boundary = Boundary(
            {"gate_up": Port((None, 2 * width), cut, stacked=2)}, {"y": Port((None, width), cut)}, tokenwise=True
        )

    def forward(self, gate_up: Tensor) -> Tensor:
        """[t, 2f] -> [t, f]."""
        return ops.silu_mul(gate_up)


class SwiGlu(Module):
    """down(silu(gate(x)) * up(x)), with gate and up stacked in one matrix [2f, d]."""

    def __init__(
        self,
        hidden: int,
        width: int,
        *,
        bias: bool = False,
        axes: tuple[str, ...] = ("tp",),
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        outputs = {"gate_proj": width, "up_proj": width}
        self.gate_up = Linear(hidden, outputs, split=Split.COLUMNS, bias=bias, axes=axes, dtype=dtype)
        self.activation = Activation(width, axes)
        self.down = Linear(width, {"down_proj": hidden}, split=Split.ROWS, bias=bias, axes=axes, dtype=dtype)
        self.boundary = Boundary(
            {"x": Port((None, hidden), {axis: Replicate() for axis in axes if axis in TOKEN_AXES})},
            {"y": Port((None, hidden), dict.fromkeys(axes, Partial()))},
            edges=edges("x -> gate_up.x", "gate_up.y -> activation.gate_up", "activation.y -> down.x", "down.y -> y"),
        )

    def sources(self, prefix: str) -> Iterator[WeightSource]:
        """gate_proj, up_proj and down_proj below `prefix`."""
        yield from self.gate_up.sources(prefix)
        yield from self.down.sources(prefix)

    def forward(self, x: Tensor) -> Tensor:
        """[t, d] -> [t, d]."""
        return self.down(self.activation(self.gate_up(x)))  # type: ignore[no-any-return]

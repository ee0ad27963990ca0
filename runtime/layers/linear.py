"""Linear layers, several checkpoint matrices stacked into one where they share their input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum

import torch
from torch import Tensor

from tokenrelay.kernels import ops
from tokenrelay.kernels.packed import PackedWeight, pack, packs_well
from tokenrelay.kernels.quantized import QuantizedWeight, WeightForm, quantize
from tokenrelay.kernels.scaled import BlockScaledWeight
from tokenrelay.runtime.layers.module import Module
from tokenrelay.runtime.layers.sources import WeightPart, WeightSource, parameter
from tokenrelay.runtime.placement import Boundary, Layout, Partial, Placement, Port, Replicate, Shard


class Split(Enum):
    """How a matrix is cut over mesh axes, after Megatron-LM (arXiv:1909.08053, section 3)."""

    COLUMNS = "columns"  # outputs are dealt out; the input is whole
    ROWS = "rows"  # inputs are dealt out; the output is a sum over ranks
    WHOLE = "whole"


class Linear(Module):
    """y [t, out] = x [t, in] W^T + b, with W [out, in] as PyTorch has it.

    `outputs` maps checkpoint names to widths; their matrices are stacked in that order. `axes` are the mesh axes that
    `split` is over.
    """

    def __init__(
        self,
        width: int,
        outputs: Mapping[str, int],
        *,
        split: Split,
        dtype: torch.dtype,
        bias: bool = False,
        axes: tuple[str, ...] = ("tp",),
    ) -> None:
        super().__init__()
        self.outputs = dict(outputs)
        self.width = width
        out = sum(self.outputs.values())
        self.weight = parameter(out, width, dtype=dtype)
        self.bias = parameter(out, dtype=dtype) if bias else None
        self.quantized: QuantizedWeight | None = None  # in the place of `weight`, once `quantize` was called
        self.packed: PackedWeight | None = None  # in the place of either, once `pack` was called
        self.scaled: BlockScaledWeight | None = None  # in the place of `weight`, once `keep` was called
        self.boundary = _boundary(width, out, split, axes, bias, len(self.outputs))

    def sources(self, prefix: str) -> Iterator[WeightSource]:
        """`<prefix><name>.weight` and `.bias` for each stacked matrix."""
        first = 0
        for name, width in self.outputs.items():
            rows = (slice(first, first + width),)
            yield WeightSource(f"{prefix}{name}.weight", (width, self.width), (WeightPart(self, "weight", rows),))
            if self.bias is not None:
                yield WeightSource(f"{prefix}{name}.bias", (width,), (WeightPart(self, "bias", rows),))
            first += width

    def forward(self, x: Tensor) -> Tensor:
        """[t, in] -> [t, out]."""
        if self.packed is not None:
            return ops.packed_linear(x, self.packed, self.bias)
        if self.quantized is not None:
            return ops.quantized_linear(x, self.quantized, self.bias)
        if self.scaled is not None:
            return ops.scaled_linear(x, self.scaled, self.bias)
        return ops.linear(x, self.weight, self.bias)

    def quantize(self, form: WeightForm) -> None:
        """Keep the weights as integers from now on."""
        self.quantized = quantize(self.weight, bits=form.bits, group=form.group)
        del self.weight

    def keep(self, weight: BlockScaledWeight) -> None:
        """Compute with a checkpoint's float8 from now on; the caller has taken `weight` away."""
        self.scaled = weight

    def pack(self) -> None:
        """Keep the weights in the order in which the widest kernels read them, where this machine has those."""
        if self.scaled is not None:
            return
        weight = self.weight if self.quantized is None else self.quantized
        if packs_well(weight):
            self.packed = pack(weight)
            if self.quantized is None:
                del self.weight
            self.quantized = None


def _boundary(width: int, out: int, split: Split, axes: tuple[str, ...], bias: bool, stacked: int) -> Boundary:
    # An axis that cuts the weights sees the same tokens on all of its ranks.
    inputs: Layout = {axis: Shard(-1) if split is Split.ROWS else Replicate() for axis in axes}
    weight: Layout = {}
    outputs: Layout = {}
    if split is Split.COLUMNS:
        weight, outputs = dict.fromkeys(axes, Shard(0)), dict.fromkeys(axes, Shard(-1))
    elif split is Split.ROWS:
        weight, outputs = dict.fromkeys(axes, Shard(1)), dict.fromkeys(axes, Partial())
    parameters = {"weight": weight}
    if bias:
        # A bias after a row split belongs to the sum: the first rank adds it, the others' are zeros.
        placements: dict[Split, Placement] = {Split.COLUMNS: Shard(0), Split.ROWS: Partial()}
        parameters["bias"] = dict.fromkeys(axes, placements.get(split, Replicate()))
    y = Port((None, out), outputs, stacked=stacked)
    return Boundary({"x": Port((None, width), inputs)}, {"y": y}, parameters, tokenwise=True)

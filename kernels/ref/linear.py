"""Linear layers by torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tokenrelay.kernels.packed import PackedWeight
from tokenrelay.kernels.quantized import QuantizedWeight
from tokenrelay.kernels.registry import register
from tokenrelay.kernels.scaled import BlockScaledWeight


@register(op="linear", path="ref/torch", device="any", priority=0, invariant=False)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, wide: bool) -> Tensor:
    """See `ops.linear`."""
    out = F.linear(x, weight, bias)
    return out.float() if wide and x.element_size() < 4 else out


@register(op="quantized_linear", path="ref/torch", device="any", priority=0, invariant=False)
def quantized_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, *, wide: bool) -> Tensor:
    """See `ops.quantized_linear`; activations stay as they are."""
    out = F.linear(x.float(), weight.dequantize(), None if bias is None else bias.float())
    return out if wide else out.to(x.dtype)


@register(op="scaled_linear", path="ref/torch", device="any", priority=0, invariant=False)
def scaled_linear(x: Tensor, weight: BlockScaledWeight, bias: Tensor | None, *, wide: bool) -> Tensor:
    """See `ops.scaled_linear`; activations stay as they are."""
    out = F.linear(x.float(), weight.dequantize(), None if bias is None else bias.float())
    return out if wide else out.to(x.dtype)


@register(op="packed_linear", path="ref/torch", device="any", priority=0, invariant=False)
def packed_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, *, wide: bool) -> Tensor:
    """See `ops.packed_linear`; activations stay as they are."""
    out = F.linear(x.float(), weight.unpack().float(), None if bias is None else bias.float())
    return out if wide else out.to(x.dtype)

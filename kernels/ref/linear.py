"""Linear layers by torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tokenrelay.kernels.registry import register


@register(op="linear", path="ref/torch", device="any", priority=0)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, wide: bool) -> Tensor:
    """See `ops.linear`."""
    out = F.linear(x, weight, bias)
    return out.float() if wide and x.element_size() < 4 else out

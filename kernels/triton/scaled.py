"""Products with float8 weights that have a factor for each 128 x 128: launches.

Activations are rounded to float8 too, with a factor for each 128 of a row, so that the matrix units multiply float8;
what each 128 of the depth add up to is scaled in float32 (DeepSeek-V3, arXiv:2412.19437, section 3.3).
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from tokenrelay.kernels.scaled import BLOCK, BlockScaledWeight
from tokenrelay.kernels.triton import scaled_kernels as kernels
from tokenrelay.kernels.triton.checks import check, check_axes, check_dense
from tokenrelay.kernels.triton.language import INTERPRET

FEW_ROWS = 16  # up to which the weights' bytes are the floor


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations [rows, width] in float8, and float32 [rows, width / 128] factors."""
    rows, width = x.shape
    groups = triton.cdiv(width, BLOCK)
    out = torch.empty((rows, width), dtype=torch.float8_e4m3fn, device=x.device)
    factors = torch.empty((rows, groups), dtype=torch.float32, device=x.device)
    block_g = min(8, triton.next_power_of_2(groups))
    grid = (rows, triton.cdiv(groups, block_g))
    kernels.quantize[grid](x, out, factors, width, x.stride(0), groups, BLOCK_G=block_g, num_warps=4)
    return out, factors


def _tile(rows: int, *, fixed: bool) -> tuple[int, int, int, int]:
    """block_m, block_n, warps, stages; the depth is walked by 128. Fixed: one size, whatever the number of rows."""
    if INTERPRET.value:
        return 16, 32, 4, 2
    return (16, 64, 4, 4) if fixed or rows <= FEW_ROWS else (64, 128, 8, 3)


def scaled_linear(fixed: bool, x: Tensor, weight: BlockScaledWeight, bias: Tensor | None, *, wide: bool) -> Tensor:
    """See `ops.scaled_linear`."""
    check_axes("weight", weight.data, 2)
    check_axes("x", x, 2)
    columns, depth = weight.data.shape
    rows = x.shape[0]
    check("x", x, x, (rows, depth), torch.bfloat16)
    check_dense("weight", weight.data, x, (columns, depth), torch.float8_e4m3fn)
    check_dense("weight.factors", weight.factors, x, tuple(weight.factors.shape), torch.float32)
    if bias is not None:
        check("bias", bias, x, (columns,))
    out = torch.empty((rows, columns), dtype=torch.float32 if wide else x.dtype, device=x.device)
    if rows == 0:
        return out
    small, factors = quantize(x)
    block_m, block_n, warps, stages = _tile(rows, fixed=fixed)
    kernels.matmul[(triton.cdiv(columns, block_n), triton.cdiv(rows, block_m))](
        small,
        factors,
        weight.data,
        weight.factors,
        out if bias is None else bias,
        out,
        rows,
        columns,
        depth,
        factors.shape[1],
        BIAS=bias is not None,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=warps,
        num_stages=stages,
    )
    return out

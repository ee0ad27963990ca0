"""Linear layers and the per-head products of latent attention with invariant rows: for deterministic mode, where
torch's own, which choose an algorithm by the number of rows, may not run."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from tokenrelay.kernels.triton import matmul_kernels
from tokenrelay.kernels.triton.checks import check, check_axes
from tokenrelay.kernels.triton.language import INTERPRET


def _tile(dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """block_m, block_n, block_k, warps, stages: by the type alone, never by the number of rows."""
    if INTERPRET.value:
        return 16, 32, 32, 4, 2
    return (64, 64, 128, 4, 4) if dtype.itemsize == 2 else (32, 64, 32, 4, 3)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, wide: bool) -> Tensor:
    """See `ops.linear`."""
    check_axes("weight", weight, 2)
    columns, depth = weight.shape
    flat = x if x.dim() == 2 else x.reshape(-1, depth)
    check("x", flat, weight, (flat.shape[0], depth))
    check("weight", weight, x, (columns, depth))
    if bias is not None:
        check("bias", bias, x, (columns,))
    out = torch.empty((*x.shape[:-1], columns), dtype=torch.float32 if wide else x.dtype, device=x.device)
    _product(flat.unsqueeze(0), weight.T.unsqueeze(0), bias, out.view(1, -1, columns))
    return out


def mla_absorb(q_nope: Tensor, w_uk: Tensor, packed: object = None) -> Tensor:
    """See `ops.mla_absorb`."""
    check_axes("w_uk", w_uk, 3)
    heads, nope, rank = w_uk.shape
    check("q_nope", q_nope, w_uk, (q_nope.shape[0], heads, nope))
    out = torch.empty((q_nope.shape[0], heads, rank), dtype=q_nope.dtype, device=q_nope.device)
    _product(q_nope.transpose(0, 1), w_uk, None, out.transpose(0, 1))
    return out


def mla_expand(latent: Tensor, w_uv: Tensor, packed: object = None) -> Tensor:
    """See `ops.mla_expand`."""
    check_axes("w_uv", w_uv, 3)
    heads, value, rank = w_uv.shape
    check("latent", latent, w_uv, (latent.shape[0], heads, rank))
    out = torch.empty((latent.shape[0], heads, value), dtype=latent.dtype, device=latent.device)
    _product(latent.transpose(0, 1), w_uv.transpose(1, 2), None, out.transpose(0, 1))
    return out


def _product(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """a [batch, rows, depth] and out [batch, rows, columns] with contiguous last axes, b [batch, depth, columns]."""
    batch, rows, depth = a.shape
    columns = b.shape[2]
    if rows == 0:
        return
    block_m, block_n, block_k, warps, stages = _tile(a.dtype)
    matmul_kernels.matmul[(triton.cdiv(columns, block_n), triton.cdiv(rows, block_m), batch)](
        a,
        b,
        out if bias is None else bias,
        out,
        rows,
        columns,
        depth,
        *a.stride()[:2],
        b.stride(0),
        b.stride(2),
        b.stride(1),
        *out.stride()[:2],
        BIAS=bias is not None,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=warps,
        num_stages=stages,
    )

"""Mixture of experts: choices sorted by expert on the device, two grouped products, a sum.

Nothing waits for the device, and all sizes follow from the numbers of tokens and experts, so a recorded step may have
other choices at each replay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
from torch import Tensor

from tokenrelay.kernels.scaled import BlockScaledWeight
from tokenrelay.kernels.triton import moe_kernels as kernels
from tokenrelay.kernels.triton import route_kernels
from tokenrelay.kernels.triton.checks import check, check_axes, check_dense
from tokenrelay.kernels.triton.language import INTERPRET
from tokenrelay.kernels.triton.scaled import quantize

GROUPED_CHOICES_MAX = 1024  # that one program sorts in a few microseconds; more are sorted by torch


@dataclass(frozen=True, slots=True, eq=False)
class _Groups:
    """Choices sorted by expert; int32 on the device."""

    order: Tensor  # [t k] choices, by expert and then by token
    offsets: Tensor  # [E + 1]: first of each expert
    tile_expert: Tensor  # [tiles]; E: none
    tile_first: Tensor  # [tiles]: first row of the tile in the sorted order
    tiles: int


def _tiles_max(choices: int, count: int, block_m: int) -> int:
    """However the choices fall on the experts, each of which may leave a tile half filled."""
    return -(-choices // block_m) + min(count, choices)


def _group(experts: Tensor, count: int, block_m: int) -> _Groups:
    if experts.numel() <= GROUPED_CHOICES_MAX:
        return _group_few(experts, count, block_m)
    chosen = experts.flatten()
    known = torch.where((chosen < 0) | (chosen >= count), count, chosen)
    by_expert, order = torch.sort(known, stable=True)
    device, choices = experts.device, chosen.shape[0]
    each = torch.arange(count + 1, dtype=torch.int32, device=device)
    offsets = torch.searchsorted(by_expert, each, out_int32=True)  # [E + 1]; the last one ends what lives here
    per_expert = (offsets[1:] - offsets[:-1] + (block_m - 1)) // block_m  # [E]
    ends = torch.cumsum(per_expert, 0, dtype=torch.int32)
    tiles = _tiles_max(choices, count, block_m)
    tile = torch.arange(tiles, dtype=torch.int32, device=device)
    tile_expert = torch.searchsorted(ends, tile, right=True, out_int32=True)  # [tiles]; E beyond the last tile
    inside = tile_expert.clamp(max=count - 1)
    within = tile - (ends[inside] - per_expert[inside])
    return _Groups(order.to(torch.int32), offsets, tile_expert, offsets[inside] + within * block_m, tiles)


def _group_few(experts: Tensor, count: int, block_m: int) -> _Groups:
    """In one launch of one program, which compares every choice with those before it."""
    choices, device = experts.numel(), experts.device
    tiles = _tiles_max(choices, count, block_m)
    order, offsets, tile_expert, tile_first = (
        torch.empty(size, dtype=torch.int32, device=device) for size in (choices, count + 1, tiles, tiles)
    )
    route_kernels.group[(1,)](
        experts,
        order,
        offsets,
        tile_expert,
        tile_first,
        choices,
        tiles,
        EXPERTS=count,
        EXPERTS_P=triton.next_power_of_2(count + 1),
        BLOCK=32,
        BLOCK_M=block_m,
        num_warps=8,
    )
    return _Groups(order, offsets, tile_expert, tile_first, tiles)


def moe_route(
    logits: Tensor,
    bias: Tensor | None,
    *,
    top_k: int,
    groups: int,
    groups_top_k: int,
    scoring: Literal["softmax", "sigmoid"],
    normalize: bool,
    scale: float,
    group_score: Literal["max", "top2"],
) -> tuple[Tensor, Tensor]:
    """See `ops.moe_route`."""
    check_axes("logits", logits, 2)
    tokens, count = logits.shape
    check("logits", logits, logits, (tokens, count), torch.float32)
    if bias is not None:
        check_dense("bias", bias, logits, (count,))
    if scoring not in ("softmax", "sigmoid") or group_score not in ("max", "top2"):
        raise ValueError(f"scoring {scoring!r} or group_score {group_score!r} is unknown")
    if groups < 1 or count % groups:
        raise ValueError(f"logits has {count} experts, expected a multiple of groups, {groups}")
    if not 1 <= groups_top_k <= groups:
        raise ValueError(f"groups_top_k is {groups_top_k}, expected 1 to {groups}")
    size = count // groups
    if not 1 <= top_k <= min(64, size * groups_top_k if groups > 1 else count):
        raise ValueError(f"top_k is {top_k}, expected 1 to the experts of {groups_top_k} groups of {size}, 64 at most")
    experts = torch.empty((tokens, top_k), dtype=torch.int32, device=logits.device)
    weights = torch.empty((tokens, top_k), dtype=torch.float32, device=logits.device)
    if tokens:
        route_kernels.route[(tokens,)](
            logits,
            logits if bias is None else bias,
            experts,
            weights,
            logits.stride(0),
            scale,
            GROUPS=groups,
            SIZE=size,
            GROUPS_P=triton.next_power_of_2(groups),
            SIZE_P=triton.next_power_of_2(size),
            GROUPS_TOP_K=groups_top_k,
            TOP_K=top_k,
            BIAS=bias is not None,
            SIGMOID=scoring == "sigmoid",
            TOP2=group_score == "top2",
            NORMALIZE=normalize,
            num_warps=2,
        )
    return experts, weights


def _tile(choices: int, count: int, dtype: torch.dtype, *, fixed: bool) -> tuple[int, int, int, int, int]:
    """block_m, block_n, block_k, warps, stages. Few rows an expert: the weights' bytes are the floor, and a tile of 16
    rows is enough; many: the product's rate. Fixed: one size, so that a row does not see how many others there are."""
    if INTERPRET.value:
        return 16, 32, 128 if dtype is torch.float8_e4m3fn else 32, 4, 2
    if dtype is torch.float32:
        return 16, 64, 32, 4, 2
    block_k = 128 if dtype is torch.float8_e4m3fn else 64
    rows = choices / count
    if fixed or rows <= 16:
        return 16, 64, 128, 4, 4
    many = rows > 128 and dtype is not torch.float8_e4m3fn  # whose second sums would not fit the registers
    return (128 if many else 64, 128, block_k, 8, 3)


def moe(fixed: bool, x: Tensor, experts: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """See `ops.moe`."""
    check_axes("w_down", w_down, 3)
    count, width, hidden = w_down.shape
    check_dense("w_gate_up", w_gate_up, x, (count, 2 * hidden, width))
    check_dense("w_down", w_down, x, (count, width, hidden))
    return _experts(fixed, x, experts, weights, (w_gate_up, None), (w_down, None))


def scaled_moe(
    fixed: bool,
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    w_gate_up: BlockScaledWeight,
    w_down: BlockScaledWeight,
) -> Tensor:
    """See `ops.scaled_moe`."""
    check_axes("w_down", w_down.data, 3)
    count, width, hidden = w_down.data.shape
    check_dense("w_gate_up", w_gate_up.data, x, (count, 2 * hidden, width), torch.float8_e4m3fn)
    check_dense("w_down", w_down.data, x, (count, width, hidden), torch.float8_e4m3fn)
    for name, weight in (("w_gate_up", w_gate_up), ("w_down", w_down)):
        check_dense(f"{name}.factors", weight.factors, x, tuple(weight.factors.shape), torch.float32)
    first, second = ((weight.data, weight.factors) for weight in (w_gate_up, w_down))
    return _experts(fixed, x, experts, weights, first, second)


_Scaled = tuple[Tensor, Tensor | None]  # values, and their factors where they are float8


def _experts(fixed: bool, x: Tensor, experts: Tensor, weights: Tensor, gate_up: _Scaled, down: _Scaled) -> Tensor:
    """Both products and the sum; activations become float8 before each where the weights are."""
    count, width, hidden = down[0].shape
    check_axes("experts", experts, 2)
    check("x", x, experts, (experts.shape[0], width), x.dtype)
    check_dense("experts", experts, x, tuple(experts.shape), torch.int32)
    check_dense("weights", weights, x, tuple(experts.shape), torch.float32)
    tokens, top_k = experts.shape
    out = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
    if not experts.numel():
        return out.zero_()
    tile = _tile(tokens * top_k, count, down[0].dtype, fixed=fixed)
    groups = _group(experts, count, tile[0])
    scaled = down[1] is not None
    inner = torch.empty((tokens * top_k, hidden), dtype=x.dtype, device=x.device)
    _product(quantize(x) if scaled else (x, None), gate_up, weights, inner, groups, tile, top_k, gated=True)
    parts = torch.empty((tokens * top_k, width), dtype=torch.float32, device=x.device)
    _product(quantize(inner) if scaled else (inner, None), down, weights, parts, groups, tile, top_k, gated=False)
    return _sum(parts, experts, out, count)


def _product(
    left: _Scaled,
    right: _Scaled,
    weights: Tensor,
    out: Tensor,
    groups: _Groups,
    tile: tuple[int, int, int, int, int],
    top_k: int,
    *,
    gated: bool,
) -> None:
    (a, a_factors), (b, b_factors) = left, right
    block_m, block_n, block_k, warps, stages = tile
    count, _, depth = b.shape
    columns = out.shape[1]
    kernels.experts[(groups.tiles, triton.cdiv(columns, block_n))](
        a,
        a if a_factors is None else a_factors,
        b,
        b if b_factors is None else b_factors,
        weights,
        out,
        groups.order,
        groups.offsets,
        groups.tile_expert,
        groups.tile_first,
        a.stride(0),
        depth,
        columns,
        b.stride(0),
        0 if b_factors is None else b_factors.stride(0),
        0 if b_factors is None else b_factors.stride(1),
        TOP_K=top_k,
        GATED=gated,
        SCALED=b_factors is not None,
        EXPERTS=count,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=warps,
        num_stages=stages,
    )


def _sum(parts: Tensor, experts: Tensor, out: Tensor, count: int) -> Tensor:
    tokens, top_k = experts.shape
    width = out.shape[1]
    block = min(1024, triton.next_power_of_2(width))
    kernels.gather[(tokens, triton.cdiv(width, block))](
        parts, experts, out, width, EXPERTS=count, TOP_K=top_k, BLOCK=block, num_warps=4
    )
    return out

"""Cases of bench/gpu.py beside attention and experts: float8 linear layers, and rotation with the cache write.

The peers are the same work in other kernels of ours: a bfloat16 product of the same shape, and the launches that one
launch replaces. So a line says whether float8 pays there, and what a launch costs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from gpu import NOPE, PAGE, RANK, ROPE, Call, Case, copies_of
from torch import Tensor

from tokenrelay.kernels import ops, registry
from tokenrelay.kernels.layout import GqaLayout, MlaFp8Layout, MlaLayout
from tokenrelay.kernels.ref import elementwise as ref
from tokenrelay.kernels.ref import fp8
from tokenrelay.kernels.scaled import BlockScaledWeight

HEADS, KV_HEADS, HEAD_DIM = 64, 8, 128  # of grouped attention; 128 heads of latent attention
CONTEXT = 4096


def error_of(found: Tensor, truth: Tensor) -> float:
    """Of the norm."""
    return float((found.double() - truth).norm() / truth.norm())


def linear_case(tokens: int, width: int, columns: int, device: torch.device) -> Case:
    """Float8 weights and activations; the check asks for a quarter of what activations of three bits may be off."""
    size = columns * width
    many = copies_of(size)
    x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
    wide = [torch.randn(columns, width, device=device, dtype=torch.bfloat16) / width**0.5 for _ in range(many)]
    small = [BlockScaledWeight.of(weight) for weight in wide]

    def check() -> float:
        return error_of(ops.scaled_linear(x, small[0]), x.double() @ small[0].dequantize().double().T) / 4

    calls: list[Call] = [functools.partial(ops.scaled_linear, x, w) for w in small]
    peer: list[Call] = [functools.partial(ops.linear, x, w) for w in wide]
    label = f"tokens={tokens} {width}x{columns} float8"
    moved = small[0].nbytes + 2 * tokens * (width + columns)
    return Case("scaled_linear", label, moved, 2 * tokens * size, calls, check, peers={"bf16": peer})


def apart(op: str, call: Call) -> Call:
    """The same call by the launches that one launch replaces."""

    def run() -> object:
        with registry.force(op, registry.PARTS):
            return call()

    return run


def places(tokens: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int]:
    """Positions, their table, slots of a cache in random order, and its blocks."""
    blocks = -(-tokens // PAGE) + 1
    angles = torch.randn(CONTEXT, width // 2, device=device)
    table = torch.cat([angles.cos(), angles.sin()], -1)
    slots = torch.randperm(blocks * PAGE, device=device)[:tokens]
    return torch.randint(CONTEXT, (tokens,), device=device), table, slots, blocks


def gqa_write_case(tokens: int, device: torch.device) -> Case:
    """Queries and keys of heads, from a stacked projection."""
    at, table, slots, blocks = places(tokens, HEAD_DIM, device)
    heads = HEADS + 2 * KV_HEADS
    qkv = torch.randn(tokens, heads, HEAD_DIM, device=device, dtype=torch.bfloat16)
    q, k, v = qkv.split_with_sizes((HEADS, KV_HEADS, KV_HEADS), dim=1)
    cache = torch.zeros(GqaLayout(KV_HEADS, HEAD_DIM, PAGE).shape(blocks), device=device, dtype=torch.bfloat16)

    def call() -> Tensor:
        return ops.gqa_rotary_write(q, k, v, at, table, cache, slots)

    def check() -> float:
        turned = call()
        wide_q, wide_k = ref.rotary(q.double(), k.double(), at, table.double(), False)
        written = cache[slots // PAGE, :, :, slots % PAGE]
        return max(error_of(turned, wide_q), error_of(written, torch.stack((wide_k, v.double()), dim=1)))

    peers: dict[str, list[Call]] = {"apart": [apart("gqa_rotary_write", call)]}
    return Case("rotary_write", f"gqa tokens={tokens}", 4 * qkv.numel(), 0, [call], check, peers=peers)


def mla_write_case(tokens: int, device: torch.device, *, small: bool) -> Case:
    """The rotated parts of 128 heads and of the key, and the latent."""
    at, table, slots, blocks = places(tokens, ROPE, device)
    layout = MlaFp8Layout(RANK, ROPE, PAGE) if small else MlaLayout(RANK, ROPE, PAGE)
    cache = torch.zeros(layout.shape(blocks), device=device).to(torch.float8_e4m3fn if small else torch.bfloat16)
    q = torch.randn(tokens, 2 * HEADS, NOPE + ROPE, device=device, dtype=torch.bfloat16)[..., NOPE:]
    both = torch.randn(tokens, RANK + ROPE, device=device, dtype=torch.bfloat16)
    latent, k = both.split_with_sizes((RANK, ROPE), dim=-1)

    def call() -> Tensor:
        return ops.mla_rotary_write(q, latent, k, at, table, True, cache, slots)

    def check() -> float:
        turned = call()
        wide_q, wide_k = ref.rotary(q.double(), k.double().unsqueeze(1), at, table.double(), True)
        entries = cache.view(-1, layout.width)[slots]
        truth = torch.cat((latent.double(), wide_k.squeeze(1)), dim=-1)
        # Latents of three bits of mantissa are off by some hundredths.
        off = error_of(fp8.decode(entries, RANK), truth) / 4 if small else error_of(entries, truth)
        return max(error_of(turned, wide_q), off)

    moved = 4 * q.numel() + 2 * both.numel() + tokens * layout.width * cache.element_size()
    peers: dict[str, list[Call]] = {"apart": [apart("mla_rotary_write", call)]}
    label = f"mla tokens={tokens}{' float8' if small else ''}"
    return Case("rotary_write", label, moved, 0, [call], check, peers=peers)


def cases(device: torch.device, *, quick: bool) -> Iterator[Callable[[], Case]]:
    """As gpu.cases."""
    shapes = ((7168, 2112), (7168, 36_864), (18_432, 7168))  # DeepSeek-V3's down-projections, gate and up, down
    for tokens in (1, 64) if quick else (1, 16, 64, 512, 4096):
        for width, columns in shapes:
            yield functools.partial(linear_case, tokens, width, columns, device)
        yield functools.partial(gqa_write_case, tokens, device)
        for small in (False, True):
            yield functools.partial(mla_write_case, tokens, device, small=small)

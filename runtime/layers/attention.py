"""Grouped-query attention over a paged cache (arXiv:2305.13245), with Qwen3's norm of queries and keys where asked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenrelay.kernels import ops
from tokenrelay.runtime.layers.linear import Linear, Split
from tokenrelay.runtime.layers.module import Module
from tokenrelay.runtime.layers.norm import RmsNorm
from tokenrelay.runtime.layers.sources import WeightSource
from tokenrelay.runtime.placement import Boundary, Layout, Partial, Port, Replicate, Shard, edges


@dataclass(frozen=True)
class Gqa:
    """Hyperparameters of grouped-query attention; `heads` is a multiple of `kv_heads`."""

    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False


class GqaHeads(Module):
    """From stacked projections to heads: norm and rotation."""

    def __init__(self, gqa: Gqa, eps: float, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.head_dim = gqa.head_dim
        self.split = (gqa.heads, gqa.kv_heads, gqa.kv_heads)
        self.q_norm = RmsNorm("q_norm", gqa.head_dim, eps, dtype=dtype) if gqa.qk_norm else None
        self.k_norm = RmsNorm("k_norm", gqa.head_dim, eps, dtype=dtype) if gqa.qk_norm else None
        cut = {"tp": Shard(-1)}
        whole_heads = math.gcd(gqa.heads, gqa.kv_heads)  # q, k and v are each cut by heads
        q, kv = ((None, heads, gqa.head_dim) for heads in (gqa.heads, gqa.kv_heads))
        by_head = {"tp": Shard(1)}
        self.boundary = Boundary(
            {"qkv": Port((None, sum(self.split) * gqa.head_dim), cut, pieces=whole_heads, stacked=3)},
            {"q": Port(q, by_head), "k": Port(kv, by_head), "v": Port(kv, by_head)},
        )

    def sources(self, prefix: str) -> Iterator[WeightSource]:
        """q_norm and k_norm below `prefix`, where there are any."""
        if self.q_norm is not None and self.k_norm is not None:
            yield from self.q_norm.sources(prefix)
            yield from self.k_norm.sources(prefix)

    def forward(self, qkv: Tensor, cos_sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[t, (h + 2 hk) * hd], int64 [t] -> [t, h, hd], [t, hk, hd], [t, hk, hd]."""
        q, k, v = self.normed(qkv)
        q, k = ops.rotary(q, k, positions, cos_sin, False)
        return q, k, v

    def normed(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `forward`, not rotated."""
        t = qkv.shape[0]
        q, k, v = qkv.view(t, -1, self.head_dim).split_with_sizes(
            self.split, dim=1
        )  # [t, h, hd], [t, hk, hd], [t, hk, hd]
        if self.q_norm is not None and self.k_norm is not None:
            q = self.q_norm(q.reshape(-1, self.head_dim)).view(q.shape)
            k = self.k_norm(k.reshape(-1, self.head_dim)).view(k.shape)
        return q, k, v


class GqaAttend(Module):
    """Cache write and attention. Along cp the keys are those of all ranks, the queries a rank's own."""

    def __init__(self, gqa: Gqa) -> None:
        super().__init__()
        self.width = gqa.heads * gqa.head_dim
        self.scale = gqa.head_dim**-0.5
        by_head: Layout = {"tp": Shard(1)}
        keys = Port((None, gqa.kv_heads, gqa.head_dim), {**by_head, "cp": Replicate()})
        self.boundary = Boundary(
            {"q": Port((None, gqa.heads, gqa.head_dim), by_head), "k": keys, "v": keys},
            {"y": Port((None, self.width), {"tp": Shard(-1)}, pieces=gqa.heads)},
        )

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, batch: ops.AttentionBatch, cache: Tensor, written: Tensor
    ) -> Tensor:
        """[t, h, hd], 2 x [u, hk, hd], int64 [u] slots of the cache -> [t, h * hd]."""
        ops.gqa_cache_write(k, v, cache, written)
        return self.over(q, batch, cache)

    def over(self, q: Tensor, batch: ops.AttentionBatch, cache: Tensor) -> Tensor:
        """Attention over keys that are written: [t, h, hd] -> [t, h * hd]."""
        t, decodes = q.shape[0], batch.decodes
        if t == 0:
            return q.new_empty((0, self.width))
        if decodes == t:
            y = ops.gqa_decode(q, cache, batch, self.scale)
        elif decodes == 0:
            y = ops.gqa_prefill(q, cache, batch, self.scale)
        else:
            decoded = ops.gqa_decode(q[:decodes], cache, batch, self.scale)
            y = torch.cat([decoded, ops.gqa_prefill(q[decodes:], cache, batch, self.scale)])
        return y.reshape(t, self.width)


class GqaCore(Module):
    """From stacked projections to the heads' outputs: norm, rotation, cache write, attention."""

    def __init__(self, gqa: Gqa, eps: float, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = GqaHeads(gqa, eps, dtype=dtype)
        self.attend = GqaAttend(gqa)
        self.boundary = Boundary(
            self.heads.boundary.inputs,
            self.attend.boundary.outputs,
            edges=edges(
                "qkv -> heads.qkv", *(f"heads.{name} -> attend.{name}" for name in ("q", "k", "v")), "attend.y -> y"
            ),
        )

    def narrow(self, ranks: int) -> None:
        """Keep one rank's heads: `ranks` divides both kinds (`check` has seen to it)."""
        q, k, v = self.heads.split
        self.heads.split = (q // ranks, k // ranks, v // ranks)
        self.attend.width //= ranks

    def sources(self, prefix: str) -> Iterator[WeightSource]:
        """q_norm and k_norm below `prefix`, where there are any."""
        yield from self.heads.sources(prefix)

    def forward(self, qkv: Tensor, cos_sin: Tensor, batch: ops.AttentionBatch, cache: Tensor) -> Tensor:
        """[t, (h + 2 hk) * hd] -> [t, h * hd]; writes this step's keys and values to `cache`."""
        q, k, v = self.heads.normed(qkv)
        q = ops.gqa_rotary_write(q, k, v, batch.positions, cos_sin, cache, batch.cache_slots)
        return self.attend.over(q, batch, cache)


class GqaAttention(Module):
    """x [t, d] -> [t, d] (a sum over the tensor axis)."""

    def __init__(self, gqa: Gqa, hidden: int, eps: float, *, dtype: torch.dtype) -> None:
        super().__init__()
        q_width, kv_width = gqa.heads * gqa.head_dim, gqa.kv_heads * gqa.head_dim
        outputs = {"q_proj": q_width, "k_proj": kv_width, "v_proj": kv_width}
        self.qkv = Linear(hidden, outputs, split=Split.COLUMNS, bias=gqa.qkv_bias, dtype=dtype)
        self.core = GqaCore(gqa, eps, dtype=dtype)
        self.out = Linear(q_width, {"o_proj": hidden}, split=Split.ROWS, bias=gqa.out_bias, dtype=dtype)
        self.boundary = Boundary(
            {"x": Port((None, hidden))},
            {"y": Port((None, hidden), {"tp": Partial()})},
            edges=edges("x -> qkv.x", "qkv.y -> core.qkv", "core.y -> out.x", "out.y -> y"),
        )

    def sources(self, prefix: str) -> Iterator[WeightSource]:
        """q_proj, k_proj, v_proj, o_proj and the norms below `prefix`."""
        for module in (self.qkv, self.core, self.out):
            yield from module.sources(prefix)

    def forward(self, x: Tensor, cos_sin: Tensor, batch: ops.AttentionBatch, cache: Tensor) -> Tensor:
        """[t, d] -> [t, d]; `cache` is this layer's [blocks, 2, hk, block_tokens, hd]."""
        return self.out(self.core(self.qkv(x), cos_sin, batch, cache))  # type: ignore[no-any-return]

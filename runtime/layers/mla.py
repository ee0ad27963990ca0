"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1) over a paged cache of latents.

The cache holds, per token, the normed latent [rank] and the rotated key part [rope] that all heads share. Decode folds
the up-projections into queries and outputs (section 2.1.3, "absorbed"), so that a step reads rank + rope values a token
instead of keys and values of all heads. Prefill gives the kernel the up-projections and lets it expand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenrelay.kernels import ops
from tokenrelay.kernels.packed import PackedHeads, pack_heads
from tokenrelay.runtime.layers.linear import Linear, Split
from tokenrelay.runtime.layers.module import Module
from tokenrelay.runtime.layers.norm import RmsNorm
from tokenrelay.runtime.layers.sources import WeightPart, WeightSource, parameter
from tokenrelay.runtime.placement import Boundary, Partial, Port, Replicate, Shard, edges

LATENT_EPS = (
    1e-6  # DeepSeek's code and transformers' leave the latents' norms at this default, whatever rms_norm_eps is
)


@dataclass(frozen=True)
class Mla:
    """Hyperparameters of latent attention; widths are per head but for the ranks."""

    heads: int
    q_rank: int | None  # None: queries are projected directly
    kv_rank: int
    nope: int
    rope: int
    v: int
    scale: float  # of the softmax, YaRN's correction included
    interleaved: bool
    bias: bool = False  # of the down-projections and the output


class MlaCore(Module):
    """From queries and latents to the heads' outputs: rotation, cache write, attention, both up-projections of kv."""

    def __init__(self, mla: Mla, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.mla = mla
        self.scale = mla.scale
        self.interleaved = mla.interleaved
        self.split = (mla.nope, mla.rope)
        self.heads = mla.heads
        self.out_width = mla.heads * mla.v
        self.packed: PackedHeads | None = None  # both of these again; see `pack`
        self.w_uk = parameter(mla.heads, mla.nope, mla.kv_rank, dtype=dtype)
        self.w_uv = parameter(mla.heads, mla.v, mla.kv_rank, dtype=dtype)
        cut = {"tp": Shard(-1)}
        keys = {"cp": Replicate()}  # those of all ranks, where the queries are a rank's own
        self.boundary = Boundary(
            {
                "q": Port((None, mla.heads * (mla.nope + mla.rope)), cut, pieces=mla.heads),
                "latent": Port((None, mla.kv_rank), keys),
                "k_rope": Port((None, mla.rope), keys),
            },
            {"y": Port((None, self.out_width), cut, pieces=mla.heads)},
            {"w_uk": {"tp": Shard(0)}, "w_uv": {"tp": Shard(0)}},
        )

    def narrow(self, ranks: int) -> None:
        """Keep one rank's heads; the latents are whole on each."""
        self.heads //= ranks
        self.out_width //= ranks

    def pack(self) -> None:
        """Keep the up-projections packed as well, where this machine has kernels for that."""
        self.packed = pack_heads(self.w_uk, self.w_uv)

    def sources(self, prefix: str) -> Iterator[WeightSource]:
        """`kv_b_proj` [h * (nope + v), rank], cut per head into the keys' and the values' part."""
        mla = self.mla
        yield WeightSource(
            f"{prefix}kv_b_proj.weight",
            (mla.heads * (mla.nope + mla.v), mla.kv_rank),
            (
                WeightPart(self, "w_uk", take=(slice(None), slice(0, mla.nope))),
                WeightPart(self, "w_uv", take=(slice(None), slice(mla.nope, None))),
            ),
            view=(mla.heads, mla.nope + mla.v, mla.kv_rank),
        )

    def forward(
        self,
        q: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        cos_sin: Tensor,
        batch: ops.AttentionBatch,
        cache: Tensor,
    ) -> Tensor:
        """q [t, h * (nope + rope)], latent [t, rank], k_rope [t, rope] -> [t, h * v]; writes this step's latents."""
        t = q.shape[0]
        q_nope, q_rope = q.view(t, self.heads, -1).split_with_sizes(self.split, dim=-1)  # [t, h, nope], [t, h, rope]
        q_rope = ops.mla_rotary_write(
            q_rope, latent, k_rope, batch.positions, cos_sin, self.interleaved, cache, batch.cache_slots
        )
        return self._attend(q_nope, q_rope, batch, cache)

    def apart(
        self,
        q: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        cos_sin: Tensor,
        batch: ops.AttentionBatch,
        cache: Tensor,
        keys: tuple[Tensor, Tensor],
    ) -> Tensor:
        """As `forward`, for keys of other tokens than the queries': `keys` are their positions and cache slots."""
        positions, written = keys
        rope = k_rope.unsqueeze(1)
        _, k_rotated = ops.rotary(rope, rope, positions, cos_sin, self.interleaved)
        ops.mla_cache_write(latent, k_rotated.squeeze(1), cache, written)
        t = q.shape[0]
        if t == 0:
            return q.new_empty((0, self.out_width))
        q_nope, q_rope = q.view(t, self.heads, -1).split_with_sizes(self.split, dim=-1)  # [t, h, nope], [t, h, rope]
        q_rope, _ = ops.rotary(q_rope, q_rope[:, :1], batch.positions, cos_sin, self.interleaved)
        return self._attend(q_nope, q_rope, batch, cache)

    def _attend(self, q_nope: Tensor, q_rope: Tensor, batch: ops.AttentionBatch, cache: Tensor) -> Tensor:
        """[t, h, nope], [t, h, rope] -> [t, h * v]."""
        t, decodes = q_nope.shape[0], batch.decodes
        if decodes == t:
            y = self._decode(q_nope, q_rope, batch, cache)
        elif decodes == 0:
            y = ops.mla_prefill(q_nope, q_rope, cache, batch, self.w_uk, self.w_uv, self.scale, self.packed)
        else:
            decoded = self._decode(q_nope[:decodes], q_rope[:decodes], batch, cache)
            prefilled = ops.mla_prefill(
                q_nope[decodes:], q_rope[decodes:], cache, batch, self.w_uk, self.w_uv, self.scale, self.packed
            )
            y = torch.cat([decoded, prefilled])
        return y.reshape(t, self.out_width)

    def _decode(self, q_nope: Tensor, q_rope: Tensor, batch: ops.AttentionBatch, cache: Tensor) -> Tensor:
        """Absorbed: [n, h, nope], [n, h, rope] -> [n, h, v]."""
        q_latent = ops.mla_absorb(q_nope, self.w_uk, self.packed)  # [n, h, rank]
        attended = ops.mla_decode(q_latent, q_rope, cache, batch, self.scale)  # [n, h, rank]
        return ops.mla_expand(attended, self.w_uv, self.packed)


class MlaAttention(Module):
    """x [t, d] -> [t, d] (a sum over the tensor axis)."""

    def __init__(self, mla: Mla, hidden: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        q_rank = mla.q_rank or 0
        q_width = mla.heads * (mla.nope + mla.rope)
        down = {"q_a_proj": q_rank} if q_rank else {}
        down["kv_a_proj_with_mqa"] = mla.kv_rank + mla.rope
        self.split = (q_rank, mla.kv_rank, mla.rope)
        self.down = Linear(hidden, down, split=Split.WHOLE, bias=mla.bias, dtype=dtype)
        self.q_norm = RmsNorm("q_a_layernorm", q_rank, LATENT_EPS, dtype=dtype) if q_rank else None
        self.q_up = Linear(
            q_rank or hidden, {"q_b_proj" if q_rank else "q_proj": q_width}, split=Split.COLUMNS, dtype=dtype
        )
        self.kv_norm = RmsNorm("kv_a_layernorm", mla.kv_rank, LATENT_EPS, dtype=dtype)
        self.core = MlaCore(mla, dtype=dtype)
        self.out = Linear(mla.heads * mla.v, {"o_proj": hidden}, split=Split.ROWS, bias=mla.bias, dtype=dtype)
        latent_end = q_rank + mla.kv_rank
        queries = [f"down.y[0:{q_rank}] -> q_norm.x", "q_norm.y -> q_up.x"] if q_rank else ["x -> q_up.x"]
        self.boundary = Boundary(
            {"x": Port((None, hidden))},
            {"y": Port((None, hidden), {"tp": Partial()})},
            edges=edges(
                "x -> down.x",
                *queries,
                f"down.y[{q_rank}:{latent_end}] -> kv_norm.x",
                f"down.y[{latent_end}:{latent_end + mla.rope}] -> core.k_rope",
                "q_up.y -> core.q",
                "kv_norm.y -> core.latent",
                "core.y -> out.x",
                "out.y -> y",
            ),
        )

    def sources(self, prefix: str) -> Iterator[WeightSource]:
        """All projections and norms below `prefix`."""
        for module in (self.down, self.q_norm, self.q_up, self.kv_norm, self.core, self.out):
            if module is not None:
                yield from module.sources(prefix)

    def forward(self, x: Tensor, cos_sin: Tensor, batch: ops.AttentionBatch, cache: Tensor) -> Tensor:
        """[t, d] -> [t, d]; `cache` is this layer's [blocks, block_tokens, rank + rope]."""
        q_compressed, latent, k_rope = self.down(x).split_with_sizes(self.split, dim=-1)
        q = self.q_up(x if self.q_norm is None else self.q_norm(q_compressed))
        return self.out(self.core(q, self.kv_norm(latent), k_rope, cos_sin, batch, cache))  # type: ignore[no-any-return]

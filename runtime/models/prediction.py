"""Multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2): one more layer that says what comes after next.

    model.prediction = Prediction(architecture, 61, moe=True, dtype=torch.bfloat16)
    y = model.prediction(pairs, cos_sin, batch, cache)      # [r, d]; model.head(y) are logits

The report's module k maps [RMSNorm(h); RMSNorm(Emb(t))] by M, runs one transformer block, and shares the model's
embedding and head. `h` is what the head multiplied, behind the model's last norm, and `t` the token that was said
then; so a pair stands for one token that is known. As checkpoints have it: `enorm`, `hnorm`, `eh_proj` (the embedding's
half first), the block under its own names, `shared_head.norm`.

Its KV has a layer of its own in the paged cache. The entry of token j is made of (h of j - 1, token j): like the KV of
every other layer it depends on tokens 0 to j and on nothing behind them, so blocks are shared, sealed and moved with
all their layers. The first token has no h before it: zeros stand there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokenrelay.kernels import ops
from tokenrelay.runtime.layers.linear import Linear, Split
from tokenrelay.runtime.layers.mla import MlaAttention
from tokenrelay.runtime.layers.module import Module
from tokenrelay.runtime.layers.moe import ExpertSplit
from tokenrelay.runtime.layers.norm import AddRmsNorm, RmsNorm
from tokenrelay.runtime.layers.sources import WeightSource
from tokenrelay.runtime.models.config import Architecture
from tokenrelay.runtime.models.decoder import DecoderLayer
from tokenrelay.runtime.placement import Boundary, Port, edges


@dataclass(frozen=True, slots=True)
class Pairs:
    """m entries of the layer's KV, and the r of them that are asked what comes next."""

    hidden: Tensor  # [m, d] behind the model's last norm, of the token before
    embedded: Tensor  # [m, d] the token's row of the embedding
    positions: Tensor  # int64 [m] of the token
    cache_slots: Tensor  # int64 [m] where its entry is written
    asked: Tensor  # int64 [r] among the m


class Mix(Linear):
    """`eh_proj`: y = W [e; h], W [d, 2 d]."""

    def __init__(self, width: int, *, dtype: torch.dtype) -> None:
        super().__init__(2 * width, {"eh_proj": width}, split=Split.WHOLE, dtype=dtype)
        port = Port((None, width))
        self.boundary = Boundary({"e": port, "h": port}, {"y": port}, {"weight": {}}, tokenwise=True)

    def mix(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """([m, d], [m, d]) -> [m, d]."""
        return self.forward(torch.cat((embedded, hidden), dim=-1))


class Prediction(Module):
    """The layer of one multi-token prediction module; embedding and head are the model's."""

    def __init__(self, architecture: Architecture, layer: int, *, moe: bool, dtype: torch.dtype) -> None:
        """`layer`: its number in the checkpoint, one behind the model's last. `moe`: its MLP is one of experts."""
        super().__init__()
        hidden, eps = architecture.hidden, architecture.norm_eps
        self.layer_number = layer
        self.enorm = RmsNorm("enorm", hidden, eps, dtype=dtype)
        self.hnorm = RmsNorm("hnorm", hidden, eps, dtype=dtype)
        self.mix = Mix(hidden, dtype=dtype)
        # A block whose stream begins with it, and that is not the last of its kind.
        alone = replace(architecture, layers=2, moe_layers=frozenset({0} if moe else ()))
        self.block = DecoderLayer(alone, 0, experts=ExpertSplit(), dtype=dtype)
        self.norm = AddRmsNorm("shared_head.norm", hidden, eps, dtype=dtype)
        port = Port((None, hidden))
        self.boundary = Boundary(
            {"embedded": port, "hidden": port},
            {"y": port},
            edges=edges(
                "embedded -> enorm.x",
                "hidden -> hnorm.x",
                "enorm.y -> mix.e",
                "hnorm.y -> mix.h",
                "mix.y -> block.x",
                "block.y -> norm.x",
                "block.residual -> norm.residual",
                "norm.y -> y",
            ),
        )

    def sources(self) -> Iterator[WeightSource]:
        """All tensors of the layer but `embed_tokens` and `shared_head.head`, which are the model's own once more."""
        prefix = f"model.layers.{self.layer_number}."
        for module in (self.enorm, self.hnorm, self.mix, self.block, self.norm):
            yield from module.sources(prefix)

    def forward(self, pairs: Pairs, cos_sin: Tensor, batch: ops.AttentionBatch, cache: Tensor) -> Tensor:
        """Write the entries of `pairs`, and give what the head multiplies for those that are asked: [r, d].

        `batch`: r decode rows, one for each that is asked; `cache` is the layer's [blocks, block_tokens, rank + rope].
        """
        attention = self._attention
        x, normed = self._mixed(pairs)
        q_compressed, latent, k_rope = attention.down(normed).split_with_sizes(attention.split, dim=-1)
        if attention.q_norm is None:
            q = attention.q_up(normed.index_select(0, pairs.asked))
        else:
            q = attention.q_up(attention.q_norm(q_compressed.index_select(0, pairs.asked)))
        keys = (pairs.positions, pairs.cache_slots)
        heads = attention.core.apart(q, attention.kv_norm(latent), k_rope, cos_sin, batch, cache, keys)
        y, residual = self.block.feed(attention.out(heads), x.index_select(0, pairs.asked))
        y, _ = self.norm.add(y, residual)
        return y

    def write(self, pairs: Pairs, cos_sin: Tensor, cache: Tensor) -> None:
        """Write the entries of `pairs`, and ask none."""
        attention = self._attention
        _, normed = self._mixed(pairs)
        _, latent, k_rope = attention.down(normed).split_with_sizes(attention.split, dim=-1)
        rope = k_rope.unsqueeze(1)
        _, k_rotated = ops.rotary(rope, rope, pairs.positions, cos_sin, attention.core.interleaved)
        ops.mla_cache_write(attention.kv_norm(latent), k_rotated.squeeze(1), cache, pairs.cache_slots)

    def _mixed(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """The stream at the block's beginning, and normed: [m, d] each."""
        x = self.mix.mix(self.enorm(pairs.embedded), self.hnorm(pairs.hidden))
        return x, self.block.input_norm(x)

    @property
    def _attention(self) -> MlaAttention:
        assert isinstance(self.block.attention, MlaAttention), "only latent attention has prediction layers here"
        return self.block.attention

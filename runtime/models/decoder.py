"""The decoder-only transformer that every family here is: embedding, layers, norm, head.

One flat token axis [t]: decode rows' tokens come first, then the prefill rows', as `AttentionBatch` says. Nothing here
synchronises with the device or reads metadata per layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenrelay.kernels import ops
from tokenrelay.runtime.layers.attention import GqaAttention
from tokenrelay.runtime.layers.embedding import Embedding, Head
from tokenrelay.runtime.layers.mla import Mla, MlaAttention
from tokenrelay.runtime.layers.mlp import SwiGlu
from tokenrelay.runtime.layers.module import Module, freeze_all
from tokenrelay.runtime.layers.moe import ExpertSplit, MoeMlp
from tokenrelay.runtime.layers.norm import AddRmsNorm, RmsNorm
from tokenrelay.runtime.layers.rope import cos_sin_table
from tokenrelay.runtime.layers.sources import WeightSource
from tokenrelay.runtime.models.capture import Capture
from tokenrelay.runtime.models.config import Architecture, ModelConfig
from tokenrelay.runtime.placement import TOKEN_AXES, Boundary, Layout, Partial, Port, Replicate, edges

if TYPE_CHECKING:
    from tokenrelay.kernels.program import Program
    from tokenrelay.runtime.models.prediction import Prediction

_EVERYWHERE: Layout = {axis: Replicate() for axis in TOKEN_AXES}


class SampledRows(Module):
    """After the last layer's attention only the rows that are sampled go on, before anything is summed over ranks."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        x, residual = Port((None, hidden), {"tp": Partial()}), Port((None, hidden))
        self.boundary = Boundary({"x": x, "residual": residual}, {"y": x, "residual": residual})

    def forward(self, x: Tensor, residual: Tensor, sample_rows: Tensor) -> tuple[Tensor, Tensor]:
        """([t, d], [t, d], int64 [s]) -> ([s, d], [s, d])."""
        return x.index_select(0, sample_rows), residual.index_select(0, sample_rows)


class DecoderLayer(Module):
    """Attention and MLP, each after a norm and added to the residual stream (pre-norm)."""

    def __init__(self, architecture: Architecture, layer: int, *, experts: ExpertSplit, dtype: torch.dtype) -> None:
        super().__init__()
        hidden, eps = architecture.hidden, architecture.norm_eps
        # The stream begins at the first layer: there is nothing to add to yet.
        first, last = layer == 0, layer == architecture.layers - 1
        norm = RmsNorm if first else AddRmsNorm
        self.input_norm: Any = norm("input_layernorm", hidden, eps, dtype=dtype)
        self.attention: nn.Module
        if isinstance(architecture.attention, Mla):
            self.attention = MlaAttention(architecture.attention, hidden, dtype=dtype)
        else:
            self.attention = GqaAttention(architecture.attention, hidden, eps, dtype=dtype)
        self.post_norm = AddRmsNorm("post_attention_layernorm", hidden, eps, dtype=dtype)
        self.mlp: nn.Module
        out: Layout = {"tp": Partial()}
        if architecture.moe is not None and layer in architecture.moe_layers:
            self.mlp = MoeMlp(architecture.moe, hidden, split=experts, dtype=dtype)
            out = experts.sums
        else:
            self.mlp = SwiGlu(hidden, architecture.mlp_width, bias=architecture.mlp_bias, dtype=dtype)
        self.rows = SampledRows(hidden) if last else None
        port = Port((None, hidden))
        wires = ["x -> input_norm.x", "input_norm.y -> attention.x", "post_norm.y -> mlp.x", "mlp.y -> y"]
        wires += [] if first else ["residual -> input_norm.residual"]
        attended, stream = "attention.y", "x" if first else "input_norm.residual"
        if last:
            wires += [f"{attended} -> rows.x", f"{stream} -> rows.residual"]
            attended, stream = "rows.y", "rows.residual"
        wires += [f"{attended} -> post_norm.x", f"{stream} -> post_norm.residual", "post_norm.residual -> residual"]
        self.boundary = Boundary(
            {"x": port} if first else {"x": port, "residual": port},
            {"y": Port((None, hidden), out), "residual": port},
            edges=edges(*wires),
        )

    def sources(self, prefix: str) -> Iterator[WeightSource]:
        """All tensors of the layer below `prefix`."""
        yield from self.input_norm.sources(prefix)
        yield from self.attention.sources(f"{prefix}self_attn.")  # type: ignore[operator]
        yield from self.post_norm.sources(prefix)
        yield from self.mlp.sources(f"{prefix}mlp.")  # type: ignore[operator]

    def attend(
        self, x: Tensor, residual: Tensor | None, cos_sin: Tensor, batch: ops.AttentionBatch, cache: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The first half. x [t, d] and the residual stream before it (None: x is its start) -> (attended, residual)."""
        if residual is None:
            residual = x
            normed = self.input_norm(x)
        else:
            normed, residual = self.input_norm.add(x, residual)
        return self.attention(normed, cos_sin, batch, cache), residual

    def feed(self, attended: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The second half: ([t, d], [t, d]) -> (y, residual). Tokens do not meet here: any subset will do."""
        normed, residual = self.post_norm.add(attended, residual)
        return self.mlp(normed), residual


class Model(Module):
    """A loaded model. Made by `runtime.weights.loader.load_model`."""

    config: ModelConfig
    _capture: Capture | None = None

    def __init__(self, architecture: Architecture, *, experts: ExpertSplit | None = None, dtype: torch.dtype) -> None:
        super().__init__()
        self.architecture = architecture
        vocab, hidden = architecture.vocab_size, architecture.hidden
        self.embed = Embedding("embed_tokens", vocab, hidden, dtype=dtype)
        self.layers = nn.ModuleList(
            DecoderLayer(architecture, i, experts=experts or ExpertSplit(), dtype=dtype)
            for i in range(architecture.layers)
        )
        self.norm = AddRmsNorm("norm", hidden, architecture.norm_eps, dtype=dtype)
        tied = self.embed if architecture.tied else None
        self.head = Head("lm_head", vocab, hidden, tied=tied, dtype=dtype)
        self.cos_sin = torch.empty(0)  # [context_tokens, rotated width], set by `finish`
        self.prediction: Prediction | None = None  # set by the loader where drafts want it; not part of `forward`
        self.boundary = Boundary(
            {"token_ids": Port((None,))}, {"logits": Port((None, vocab), _EVERYWHERE)}, edges=edges(*self._wires())
        )

    def _wires(self) -> Iterator[str]:
        yield "token_ids -> embed.token_ids"
        x, residual = "embed.y", ""
        for i in range(len(self.layers)):
            yield f"{x} -> layers.{i}.x"
            if i:
                yield f"{residual} -> layers.{i}.residual"
            x, residual = f"layers.{i}.y", f"layers.{i}.residual"
        yield f"{x} -> norm.x"
        yield f"{residual} -> norm.residual"
        yield "norm.y -> head.x"
        yield "head.y -> logits"

    def sources(self) -> Iterator[WeightSource]:
        """Every tensor that a checkpoint of this architecture holds, under the names that Hugging Face uses."""
        yield from self.embed.sources("model.")
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            yield from layer.sources(f"model.layers.{i}.")
        yield from self.norm.sources("model.")
        yield from self.head.sources("")
        if self.prediction is not None:
            yield from self.prediction.sources()

    def finish(self, config: ModelConfig, device: torch.device) -> None:
        """After the parameters are filled: what is computed from the configuration alone."""
        self.config = config
        self.cos_sin = cos_sin_table(self.architecture.rope, config.context_tokens, device)
        self.eval()
        freeze_all(self)

    def capture(self) -> None:
        """From now on, run as one native program where there is one. The weights are final."""
        scaled = any(getattr(module, "scaled", None) is not None for module in self.modules())
        if self.config.kv_dtype is self.config.dtype and not scaled:  # native kernels read nothing in float8
            self._capture = Capture(self)

    def captured(self) -> Program | None:
        """The native program of `forward`; None where there is none (see Capture)."""
        return None if self._capture is None else self._capture.program()

    def forward(
        self, token_ids: Tensor, batch: ops.AttentionBatch, caches: list[Tensor], sample_rows: Tensor
    ) -> Tensor:
        """token_ids int64 [t], one cache per layer, sample_rows int64 [s] -> float32 logits [s, vocab].

        Writes this step's keys and values into `caches`. The last layer's MLP, the norm and the head run for
        `sample_rows` only. No gradients are recorded (no parameter asks for one).
        """
        if self._capture is not None:
            captured = self._capture.run(token_ids, batch, caches, sample_rows)
            if captured is not None:
                return captured
        x: Tensor = self.embed(token_ids)
        residual: Tensor | None = None
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            x, residual = layer.attend(x, residual, self.cos_sin, batch, caches[i])  # type: ignore[operator]
            if i == last:
                if sample_rows.shape[0] == 0:
                    return x.new_empty((0, self.architecture.vocab_size), dtype=torch.float32)
                x, residual = layer.rows(x, residual, sample_rows)  # type: ignore[operator]
            x, residual = layer.feed(x, residual)  # type: ignore[operator]
        assert residual is not None  # a model has at least one layer
        normed, _ = self.norm.add(x, residual)
        return self.head(normed)  # type: ignore[no-any-return]

    def hidden(self, token_ids: Tensor, batch: ops.AttentionBatch, caches: list[Tensor]) -> Tensor:
        """As `forward`, up to what `head` multiplies, for every token: [t, d]."""
        if self._capture is not None:
            captured = self._capture.hidden(token_ids, batch, caches[: len(self.layers)])
            if captured is not None:
                return captured
        x: Tensor = self.embed(token_ids)
        residual: Tensor | None = None
        for layer, cache in zip(self.layers, caches, strict=False):  # behind them is the prediction layer's
            x, residual = layer.attend(x, residual, self.cos_sin, batch, cache)  # type: ignore[operator]
            x, residual = layer.feed(x, residual)  # type: ignore[operator]
        assert residual is not None  # a model has at least one layer
        normed, _ = self.norm.add(x, residual)
        return normed

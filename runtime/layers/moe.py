"""Mixture of experts: a router, stacked experts, and a shared expert where the model has one (arXiv:2401.06066)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenrelay.base.errors import PlacementError
from tokenrelay.kernels import ops
from tokenrelay.kernels.packed import COLUMNS, PackedWeight, pack, packs_well
from tokenrelay.kernels.quantized import QuantizedWeight, WeightForm, quantize
from tokenrelay.kernels.scaled import BlockScaledWeight
from tokenrelay.runtime.layers.mlp import SwiGlu
from tokenrelay.runtime.layers.module import Module
from tokenrelay.runtime.layers.sources import WeightPart, WeightSource, parameter
from tokenrelay.runtime.placement import Boundary, Layout, Partial, Port, Replicate, Shard, edges

EXPERT_AXES = ("dp", "ep", "tp")
SPARE_MAX = 64


@dataclass(frozen=True)
class ExpertSplit:
    """How a layer's experts are dealt out over EXPERT_AXES.

    Over the axes in `whole` experts are dealt out as they are, over the others each one's width is cut. With `send`
    tokens go to the ranks along dp that hold their experts (all-to-all); without it every rank gets the tokens of all.
    """

    whole: tuple[str, ...] = ("dp", "ep")
    send: bool = False
    spare: int = 0  # places of a rank beyond its experts, for replicas of busy ones (runtime/spmd/experts.py)

    def __post_init__(self) -> None:
        if self.send and "dp" not in self.whole:
            raise PlacementError(
                "tokens are sent to whole experts: leave dp among the axes that these are dealt out over"
            )

    @staticmethod
    def parse(words: str) -> ExpertSplit:
        """From a setting such as "send,whole". Raises PlacementError that lists the words.

        send: see `send`. whole: over tp experts are dealt out whole too. cut: over dp their width is cut too. spare:N:
        see `spare`.
        """
        said = {word.strip() for word in words.split(",") if word.strip()}
        spare = 0
        for word in [word for word in said if word.startswith("spare:")]:
            said.remove(word)
            number = word.removeprefix("spare:")
            if not number.isdecimal() or (spare := int(number)) > SPARE_MAX:
                raise PlacementError(
                    f"spare places of experts are written spare:N, N from 0 to {SPARE_MAX}, not {word!r}"
                )
        if unknown := said - {"send", "whole", "cut"}:
            raise PlacementError(
                f"experts are dealt out by send, whole, cut and spare:N, not by {', '.join(sorted(unknown))}"
            )
        whole = ("ep",) if "cut" in said else ("dp", "ep")
        return ExpertSplit((*whole, "tp") if "whole" in said else whole, "send" in said, spare)

    @property
    def tokens(self) -> Layout:
        """Of what goes into routing and experts: the tokens of all, or those of a rank's own sequences."""
        return {} if self.send else {"dp": Replicate()}

    @property
    def terms(self) -> Layout:
        """Of what experts give."""
        return dict.fromkeys(("ep", "tp") if self.send else EXPERT_AXES, Partial())

    @property
    def sums(self) -> Layout:
        """Of the whole layer's output: a shared expert that sees its own tokens only gives terms along tp alone."""
        return {"tp": Partial()} if self.send else self.terms

    def layout(self, width_dim: int) -> Layout:
        """Of a weight [experts, ...] whose dimension `width_dim` is the expert's width."""
        return {axis: Shard(0 if axis in self.whole else width_dim) for axis in EXPERT_AXES}


@dataclass(frozen=True)
class Moe:
    """Hyperparameters of a mixture of experts.

    Scores are softmax or sigmoid of the router's logits. `groups_top_k` of `groups` equal groups of experts stand,
    ranked by the best score ("max", DeepSeek-V2) or the sum of the two best ("top2", DeepSeek-V3, section 2.1.2 of
    arXiv:2412.19437); among their experts the `top_k` best are taken. `bias` adds a learnt correction for the choice
    only.
    """

    experts: int
    top_k: int
    width: int
    shared_width: int  # 0: no shared expert
    scoring: Literal["softmax", "sigmoid"]
    normalize: bool  # the chosen experts' weights add up to 1 before `scale`
    scale: float = 1.0
    groups: int = 1
    groups_top_k: int = 1
    group_score: Literal["max", "top2"] = "max"
    bias: bool = False


class Router(Module):
    """x [t, d] -> (experts int32 [t, k], weights float32 [t, k]). Scores are float32 whatever the model's dtype is."""

    def __init__(self, moe: Moe, hidden: int, split: ExpertSplit) -> None:
        super().__init__()
        self.moe = moe
        self.weight = parameter(moe.experts, hidden, dtype=torch.float32)
        self.bias = parameter(moe.experts, dtype=torch.float32) if moe.bias else None
        chosen = Port((None, moe.top_k), split.tokens)
        parameters: dict[str, Layout] = {"weight": {}, "bias": {}} if moe.bias else {"weight": {}}
        x = Port((None, hidden), split.tokens)
        self.boundary = Boundary({"x": x}, {"experts": chosen, "weights": chosen}, parameters)

    def sources(self, prefix: str) -> Iterator[WeightSource]:
        """`gate.weight` and, where the model has it, `gate.e_score_correction_bias` below `prefix`."""
        yield WeightSource(f"{prefix}gate.weight", tuple(self.weight.shape), (WeightPart(self, "weight"),))
        if self.bias is not None:
            name = f"{prefix}gate.e_score_correction_bias"
            yield WeightSource(name, tuple(self.bias.shape), (WeightPart(self, "bias"),))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[t, d] -> ([t, k], [t, k])."""
        moe = self.moe
        return ops.moe_route(
            ops.linear(x.float(), self.weight),
            self.bias,
            top_k=moe.top_k,
            groups=moe.groups,
            groups_top_k=moe.groups_top_k,
            scoring=moe.scoring,
            normalize=moe.normalize,
            scale=moe.scale,
            group_score=moe.group_score,
        )


class Experts(Module):
    """All routed experts of a layer: w_gate_up [E, 2f, d], w_down [E, d, f].

    `split` says how they are dealt out on a mesh.
    """

    def __init__(self, moe: Moe, hidden: int, *, split: ExpertSplit, dtype: torch.dtype) -> None:
        super().__init__()
        self.moe = moe
        self.hidden = hidden
        self.w_gate_up = parameter(moe.experts, 2 * moe.width, hidden, dtype=dtype)
        self.w_down = parameter(moe.experts, hidden, moe.width, dtype=dtype)
        self.quantized: tuple[QuantizedWeight, QuantizedWeight] | None = None  # in their place
        self.packed: tuple[PackedWeight, PackedWeight] | None = None  # in the place of either
        self.scaled: tuple[BlockScaledWeight, BlockScaledWeight] | None = None  # in the place of the first
        chosen = Port((None, moe.top_k), split.tokens)
        self.boundary = Boundary(
            {"x": Port((None, hidden), split.tokens), "experts": chosen, "weights": chosen},
            # A rank adds what its own experts, and its part of their width, give to each token.
            {"y": Port((None, hidden), split.terms)},
            {"w_gate_up": split.layout(1), "w_down": split.layout(2)},
            sends=("dp",) if split.send else (),
        )

    def sources(self, prefix: str) -> Iterator[WeightSource]:
        """`experts.{e}.gate_proj`, `up_proj` and `down_proj` below `prefix`."""
        f, d = self.moe.width, self.hidden
        for e in range(self.moe.experts):
            name = f"{prefix}experts.{e}."
            gate, up = (e, slice(0, f)), (e, slice(f, 2 * f))
            yield WeightSource(f"{name}gate_proj.weight", (f, d), (WeightPart(self, "w_gate_up", gate),))
            yield WeightSource(f"{name}up_proj.weight", (f, d), (WeightPart(self, "w_gate_up", up),))
            yield WeightSource(f"{name}down_proj.weight", (d, f), (WeightPart(self, "w_down", (e,)),))

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """[t, d], [t, k], [t, k] -> [t, d]."""
        if self.packed is not None:
            return ops.packed_moe(x, experts, weights, *self.packed)
        if self.quantized is not None:
            return ops.quantized_moe(x, experts, weights, *self.quantized)
        if self.scaled is not None:
            return ops.scaled_moe(x, experts, weights, *self.scaled)
        return ops.moe(x, experts, weights, self.w_gate_up, self.w_down)

    def quantize(self, form: WeightForm) -> None:
        """Keep the weights as integers from now on."""
        gate_up = quantize(self.w_gate_up, bits=form.bits, group=form.group)
        del self.w_gate_up
        self.quantized = gate_up, quantize(self.w_down, bits=form.bits, group=form.group)
        del self.w_down

    def keep(self, gate_up: BlockScaledWeight, down: BlockScaledWeight) -> None:
        """Compute with a checkpoint's float8 from now on; the caller has taken the parameters away."""
        self.scaled = gate_up, down

    def pack(self) -> None:
        """Keep the weights in the order in which the widest kernels read them, where this machine has those."""
        if self.scaled is not None:
            return
        gate_up, down = (self.w_gate_up, self.w_down) if self.quantized is None else self.quantized
        if packs_well(gate_up) and packs_well(down) and self.moe.width % COLUMNS == 0 and self.hidden % COLUMNS == 0:
            quantized, self.quantized = self.quantized is not None, None
            self.packed = pack(gate_up), pack(down)
            if not quantized:
                del self.w_gate_up, self.w_down


class MoeMlp(Module):
    """The routed experts' weighted sum plus the shared expert: [t, d] -> [t, d]."""

    def __init__(self, moe: Moe, hidden: int, *, split: ExpertSplit, dtype: torch.dtype) -> None:
        super().__init__()
        self.router = Router(moe, hidden, split)
        self.experts = Experts(moe, hidden, split=split, dtype=dtype)
        axes = ("tp",) if split.send else EXPERT_AXES  # of the shared expert: where its tokens are whole
        self.shared = SwiGlu(hidden, moe.shared_width, axes=axes, dtype=dtype) if moe.shared_width else None
        wires = ["x -> router.x", "x -> experts.x", "router.experts -> experts.experts"]
        wires += ["router.weights -> experts.weights", "experts.y -> y"]
        wires += ["x -> shared.x", "shared.y -> y"] if self.shared is not None else []
        self.boundary = Boundary(
            {"x": Port((None, hidden), split.tokens)},
            {"y": Port((None, hidden), split.sums)},
            edges=edges(*wires),
        )

    def sources(self, prefix: str) -> Iterator[WeightSource]:
        """The router, all experts and `shared_experts` below `prefix`."""
        yield from self.router.sources(prefix)
        yield from self.experts.sources(prefix)
        if self.shared is not None:
            yield from self.shared.sources(f"{prefix}shared_experts.")

    def forward(self, x: Tensor) -> Tensor:
        """[t, d] -> [t, d]."""
        experts, weights = self.router(x)
        routed: Tensor = self.experts(x, experts, weights)
        return routed if self.shared is None else routed + self.shared(x)

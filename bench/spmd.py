"""What the SPMD compiler costs: Python beside the kernels, per layer, and the time to compile 61 layers.

    python bench/spmd.py --quick
    python bench/spmd.py --json bench/results/spmd-2026-11-21.json

One rank of tp=2, its collectives replaced by nothing (the tensors stay as they are, so only Python is measured): the
compiled program beside a loop over the same modules with two all_reduces a layer written by hand. Both run the same
kernels on the same small tensors, in turns; processor time of this thread, medians. The loop and the program are held
to the same collectives, in kind and order, before anything is measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenrelay.kernels.batch import AttentionBatch
from tokenrelay.runtime.layers.moe import ExpertSplit
from tokenrelay.runtime.models.config import Architecture, ModelConfig
from tokenrelay.runtime.models.decoder import Model
from tokenrelay.runtime.models.fields import Fields
from tokenrelay.runtime.models.registry import architecture_of
from tokenrelay.runtime.placement import Mesh
from tokenrelay.runtime.placement.cost import CostModel
from tokenrelay.runtime.placement.ir import Move
from tokenrelay.runtime.spmd.plan import make_plan
from tokenrelay.runtime.spmd.rank_model import RankModel, compile_programs
from tokenrelay.runtime.spmd.shard import shard_model

LAYERS, BLOCKS, BLOCK_TOKENS = 8, 4, 16
TP2 = Mesh(tp=2)
CONFIGS = Path(__file__).parents[1] / "tests" / "spmd" / "configs"
_SMALL: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {**_SMALL, "architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": 2, "head_dim": 16},
    "deepseek_v3": {
        **_SMALL,
        "architectures": ["DeepseekV3ForCausalLM"],
        "kv_lora_rank": 32,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 12,
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "n_group": 1,
        "topk_group": 1,
    },
}


class Nothing:
    """Collectives that leave tensors alone and remember what they were."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.counting = True

    def connect(self, axes: tuple[str, ...]) -> None:
        """Nobody is there."""

    def mover(self, move: Move) -> Callable[[Tensor], Tensor]:
        """What `move` does, bound once, as Comm has it."""

        def done(x: Tensor) -> Tensor:
            if self.counting:
                self.seen.append(f"{move.kind} {'+'.join(move.axes)} {tuple(x.shape)}")
            return x

        return done


def build(name: str) -> tuple[Model, RankModel, Nothing]:
    """Rank 0's part of a small model with zeros for weights, and its program."""
    _, architecture = architecture_of(Fields(MODELS[name], name))
    with torch.device("meta"):
        model = Model(architecture, dtype=torch.float32)
    shard_model(model, {}, TP2, 0)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.zero_()
    model.finish(_config(name, architecture), torch.device("cpu"))
    nothing = Nothing()
    return model, RankModel(model, compile_programs(architecture, TP2), nothing, 0), nothing  # type: ignore[arg-type]


def _config(name: str, architecture: Architecture) -> ModelConfig:
    layout = architecture.kv_layout(BLOCK_TOKENS, TP2.size("tp"))
    return ModelConfig(name, name, architecture.vocab_size, LAYERS, 64, (0,), layout, torch.float32, bytes(16))


def one_token() -> tuple[Tensor, AttentionBatch, Tensor]:
    """A decode step of one row."""
    zero = torch.zeros(1, dtype=torch.int32)
    batch = AttentionBatch(
        torch.zeros((1, BLOCKS), dtype=torch.int32),
        zero,
        zero + 3,
        zero + 1,
        torch.tensor([0, 1], dtype=torch.int32),
        torch.tensor([3]),
        torch.tensor([3]),
        1,
        4,
    )
    return torch.zeros(1, dtype=torch.int64), batch, torch.zeros(1, dtype=torch.int64)


def by_hand(model: Model, nothing: Nothing) -> Callable[[Tensor, AttentionBatch, list[Tensor], Tensor], Tensor]:
    """The same rank as one writes it: Megatron's two reductions a layer, the embedding's, and the logits' gather."""
    reduce = nothing.mover(Move("all_reduce", ("tp",), "", ""))
    gather = nothing.mover(Move("all_gather", ("tp",), "", "", 1))
    rows = model.embed.weight.shape[0]

    def step(token_ids: Tensor, batch: AttentionBatch, caches: list[Tensor], sample_rows: Tensor) -> Tensor:
        absent = (token_ids < 0) | (token_ids >= rows)
        x = reduce(model.embed(token_ids.clamp(0, rows - 1)).masked_fill_(absent.unsqueeze(-1), 0))
        residual = None
        for i, layer in enumerate(model.layers):
            if residual is None:
                residual, normed = x, layer.input_norm(x)  # type: ignore[operator]
            else:
                normed, residual = layer.input_norm.add(reduce(x), residual)  # type: ignore[union-attr, operator]
            x = layer.attention(normed, model.cos_sin, batch, caches[i])  # type: ignore[operator]
            if i == LAYERS - 1:
                x, residual = layer.rows(x, residual, sample_rows)  # type: ignore[operator]
            normed, residual = layer.post_norm.add(reduce(x), residual)  # type: ignore[union-attr, operator]
            x = layer.mlp(normed)  # type: ignore[operator]
        assert residual is not None
        normed, _ = model.norm.add(reduce(x), residual)
        return gather(model.head(normed))

    return step


def overhead(name: str, rounds: int) -> dict[str, float]:
    """Microseconds of Python a layer beyond the loop by hand."""
    model, compiled, nothing = build(name)
    hand = by_hand(model, nothing)
    token_ids, batch, sample_rows = one_token()
    caches = [torch.zeros(model.config.kv_layout.shape(BLOCKS)) for _ in range(LAYERS)]
    seen = []
    for run in (hand, compiled):
        nothing.seen = []
        run(token_ids, batch, caches, sample_rows)
        seen.append(nothing.seen)
    assert seen[0] == seen[1], f"{name}: the program's collectives {seen[1]} are not those by hand {seen[0]}"
    nothing.counting = False
    times: dict[str, list[int]] = {"by hand": [], "compiled": []}
    for _ in range(rounds):
        for label, run in (("by hand", hand), ("compiled", compiled)):
            began = time.thread_time_ns()
            run(token_ids, batch, caches, sample_rows)
            times[label].append(time.thread_time_ns() - began)
    layer_us = {label: statistics.median(found) / LAYERS / 1000 for label, found in times.items()}
    return {
        f"{name}, by hand, us a layer": round(layer_us["by hand"], 1),
        f"{name}, compiled, us a layer": round(layer_us["compiled"], 1),
        f"{name}, beyond, us a layer": round(layer_us["compiled"] - layer_us["by hand"], 2),
    }


def compile_times() -> dict[str, float]:
    """Processor seconds for models of 61 layers."""
    found = {}
    for name in ("deepseek_v3", "kimi_k2"):
        for mesh, words in ((Mesh(tp=4), ""), (Mesh(dp=8, tp=8), "send,whole"), (Mesh(pp=2, dp=2, cp=2, tp=4), "")):
            plan = make_plan(CONFIGS / f"{name}.json", mesh, CostModel(), experts=ExpertSplit.parse(words))
            assert plan.compile_s < 2, f"{name} on {mesh!r} took {plan.compile_s:.2f} s to compile"
            found[f"{name} on {mesh!r}, compile_s"] = round(plan.compile_s, 3)
    return found


def main() -> None:
    """Print a table, and write it where --json says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    with torch.inference_mode():
        for name in MODELS:
            figures |= overhead(name, 200 if options.quick else 2000)
    figures |= compile_times()
    for name, value in figures.items():
        print(f"{name:60} {value:10.2f}")
    if options.json:
        options.json.write_text(json.dumps({"bench": "spmd", "figures": figures}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Programs on gloo ranks: logits are those of one rank, for each family, prefill and decode, dense and mixed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import CASES, LLAMA3, YARN, relative_error
from paged import Paged

from tokenrelay.base.errors import PlacementError
from tokenrelay.runtime.layers.moe import ExpertSplit
from tokenrelay.runtime.placement import Mesh
from tokenrelay.runtime.spmd.ranks import Ranks
from tokenrelay.runtime.weights.loader import load_model

TOLERANCE = 1e-5
BLOCKS = 64
FOUR: dict[str, Any] = {"num_key_value_heads": 4}  # so that four ranks have one each
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "v2": ("deepseek_v2", {"q_lora_rank": 24, "rope_parameters": YARN}),
    "v3": ("deepseek_v3", {"num_hidden_layers": 3, "attention_bias": True}),
    "llama": ("llama", {**FOUR, "attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
    "qwen2": ("qwen2", {**FOUR, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**FOUR, "max_shard_size": "60KB"}),
    "qwen3_moe": ("qwen3_moe", {**FOUR, "num_hidden_layers": 3, "decoder_sparse_step": 2, "mlp_only_layers": [0]}),
}


def prompt(length: int, seed: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(3, 384) for _ in range(length)]


def transcript(model: Any) -> list[torch.Tensor]:
    """Logits of a long prefill, a chunk without samples' neighbours, mixed steps and decodes."""
    paged = Paged(model, blocks=BLOCKS, seed=3)
    found = []
    a, b = paged.add(prompt(90, 1)), paged.add(prompt(70, 2))

    def step(lengths: dict[int, int], *, every: bool = False) -> None:
        logits = paged.step(lengths, every=every)
        found.extend(logits[row] for row in sorted(logits))

    step({a: 64}, every=True)  # many tokens, all sampled: cut around the norms
    step({a: 1, b: 17})
    step({a: 1, b: 1})
    step({a: 7, b: 40}, every=True)
    step({b: 2})
    return found


def compare(ranks: Ranks, folder: Path, mesh: Mesh, experts: str = "") -> None:
    expected = transcript(load_model(folder, dtype=torch.float32, block_tokens=16))
    model = ranks.load(folder, mesh, dtype=torch.float32, block_tokens=16, experts=ExpertSplit.parse(experts))
    model.allocate(BLOCKS)
    for i, (found, right) in enumerate(zip(transcript(model), expected, strict=True)):
        error = relative_error(found, right)
        assert error <= TOLERANCE, f"{mesh!r}, row {i}: {error:.1e}"


@pytest.mark.parametrize("mesh", [Mesh(tp=2), Mesh(tp=4)], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_tensor_parallel(ranks: Ranks, checkpoint: Callable[..., Path], name: str, mesh: Mesh) -> None:
    family, overrides = FAMILIES[name]
    compare(ranks, checkpoint(name, family, **overrides), mesh)


@pytest.mark.parametrize("mesh", [Mesh(ep=2), Mesh(ep=2, tp=2)], ids=str)
@pytest.mark.parametrize("name", ["v2", "v3", "qwen3_moe"])
def test_expert_parallel(ranks: Ranks, checkpoint: Callable[..., Path], name: str, mesh: Mesh) -> None:
    family, overrides = FAMILIES[name]
    compare(ranks, checkpoint(name, family, **overrides), mesh)


@pytest.mark.parametrize("mesh", [Mesh(ep=2), Mesh(dp=2, ep=2)], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_a_model_without_experts_on_their_axis(
    ranks: Ranks, checkpoint: Callable[..., Path], name: str, mesh: Mesh
) -> None:
    """Along `ep` its ranks do the same, and nothing is sent."""
    family, overrides = FAMILIES[name]
    compare(ranks, checkpoint(name, family, **overrides), mesh)


@pytest.mark.parametrize("mesh", [Mesh(cp=2), Mesh(pp=2), Mesh(dp=2), Mesh(cp=2, tp=2), Mesh(pp=2, dp=2)], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_sequences_tokens_and_layers_dealt_out(
    ranks: Ranks, checkpoint: Callable[..., Path], name: str, mesh: Mesh
) -> None:
    family, overrides = FAMILIES[name]
    compare(ranks, checkpoint(name, family, **overrides), mesh)


@pytest.mark.parametrize(
    ("mesh", "experts"),
    [
        (Mesh(dp=2), "cut"),
        (Mesh(dp=2), "send"),
        (Mesh(dp=2, ep=2), ""),
        (Mesh(dp=2, ep=2), "send"),
        (Mesh(dp=2, tp=2), "send,whole"),
        (Mesh(pp=2, dp=2), "send"),
        (Mesh(cp=2, ep=2), ""),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["v2", "v3", "qwen3_moe"])
def test_experts_of_dealt_sequences(
    ranks: Ranks, checkpoint: Callable[..., Path], name: str, mesh: Mesh, experts: str
) -> None:
    family, overrides = FAMILIES[name]
    compare(ranks, checkpoint(name, family, **overrides), mesh, experts)


@pytest.mark.parametrize("mesh", [Mesh(pp=2), Mesh(pp=2, dp=2), Mesh(pp=2, cp=2), Mesh(pp=2, tp=2)], ids=str)
@pytest.mark.parametrize("name", ["v3", "qwen3"])
def test_stages_work_on_micro_batches(
    ranks: Ranks, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, name: str, mesh: Mesh
) -> None:
    """A step of some tokens is cut into as many parts as there may be, prefills in the middle."""
    family, overrides = FAMILIES[name]
    monkeypatch.setattr("tokenrelay.runtime.spmd.ranks.MICRO_TOKENS_MIN", 3)
    compare(ranks, checkpoint(name, family, **overrides), mesh)


def test_every_family_is_covered() -> None:
    assert {family for family, _ in FAMILIES.values()} == {case.family for case in CASES}


def test_a_rank_holds_its_shard_only(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("v3", *FAMILIES["v3"][:1], **FAMILIES["v3"][1])
    whole = load_model(folder)
    parts = [load_model(folder, mesh=Mesh(tp=4), rank=rank) for rank in range(4)]
    for name in ("layers.0.mlp.gate_up.weight", "layers.1.mlp.experts.w_down", "layers.0.attention.core.w_uk"):
        assert parts[3].get_parameter(name).numel() * 4 == whole.get_parameter(name).numel()
    rows = [part.get_parameter("embed.weight") for part in parts]
    assert torch.equal(torch.cat(rows), whole.get_parameter("embed.weight"))
    gate_up = whole.get_parameter("layers.0.mlp.gate_up.weight")
    gate, up = parts[2].get_parameter("layers.0.mlp.gate_up.weight").chunk(2)
    assert torch.equal(gate, gate_up[48:72]) and torch.equal(up, gate_up[144:168]), "gate and up are cut each"
    bias = [part.get_parameter("layers.0.attention.out.bias") for part in parts]
    assert bias[0].any() and not any(other.any() for other in bias[1:]), "one rank adds a bias to the sum"


def test_what_ranks_cannot_run_is_refused_before_they_start(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("qwen3", *FAMILIES["qwen3"][:1], **FAMILIES["qwen3"][1])
    with Ranks(1) as alone, pytest.raises(PlacementError, match=r"Mesh\(tp=2\) has 2 ranks, and 1 were started"):
        alone.load(folder, Mesh(tp=2))
    with pytest.raises(PlacementError, match="cannot be dealt out evenly to 3 ranks"):
        load_model(folder, mesh=Mesh(tp=3))
    with pytest.raises(PlacementError, match="1 to 64"):
        Ranks(65)

"""Declared placements: edges that fit, edges that need a collective, and the mismatches that are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_cases import CASES
from torch import nn

from tokenrelay.base.errors import PlacementError
from tokenrelay.runtime.layers.linear import Linear, Split
from tokenrelay.runtime.models.decoder import Model
from tokenrelay.runtime.placement import Boundary, Edge, Mesh, Partial, Port, Replicate, Shard, check, edges

CASE = {case.name: case for case in CASES}


class Chain(nn.Module):
    """x -> a -> b -> y, with the ports given."""

    def __init__(self, a: nn.Module, b: nn.Module, *lines: str, y: Port | None = None) -> None:
        super().__init__()
        self.a, self.b = a, b
        lines = lines or ("x -> a.x", "a.y -> b.x", "b.y -> y")
        self.boundary = Boundary({"x": Port((None, 8))}, {"y": y or Port((None, 8))}, edges=edges(*lines))


class Leaf(nn.Module):
    """A module that is only its boundary."""

    def __init__(self, x: Port, y: Port) -> None:
        super().__init__()
        self.boundary = Boundary({"x": x}, {"y": y})


def linear(width: int, out: int, split: Split) -> Linear:
    return Linear(width, {"w": out}, split=split, dtype=torch.float32)


def port(width: int = 8, **layout: Any) -> Port:
    return Port((None, width), layout)


def test_column_then_row_parallel_fits_and_its_sum_needs_a_reduction() -> None:
    chain = Chain(linear(8, 16, Split.COLUMNS), linear(16, 8, Split.ROWS))
    report = check(chain, Mesh(tp=4))
    assert report.edges == 3
    assert [(c.kind, c.axis, c.source, c.target) for c in report.collectives] == [("all_reduce", "tp", "b.y", "y")]
    assert check(chain, Mesh()).collectives == (), "one rank needs nothing"


@pytest.mark.parametrize(
    ("have", "want", "kind"),
    [
        (Replicate(), Replicate(), None),
        (Shard(-1), Shard(1), None),  # the same dimension, counted from either end
        (Partial(), Partial(), None),
        (Partial(), Replicate(), "all_reduce"),
        (Partial(), Shard(0), "reduce_scatter"),
        (Shard(-1), Replicate(), "all_gather"),
        (Shard(0), Shard(1), "all_to_all"),
        (Replicate(), Shard(0), "slice"),
    ],
)
def test_each_conversion(have: Any, want: Any, kind: str | None) -> None:
    chain = Chain(Leaf(port(), port(tp=have)), Leaf(port(tp=want), port()))
    kinds = [collective.kind for collective in check(chain, Mesh(tp=2)).collectives]
    assert kinds == ([kind] if kind else [])


@pytest.mark.parametrize(
    ("have", "want"), [(Replicate(), Partial()), (Shard(0), Partial()), (Partial(), Partial("max"))]
)
@pytest.mark.parametrize("mesh", [Mesh(), Mesh(tp=2)])
def test_what_no_collective_can_do_is_refused_on_every_mesh(have: Any, want: Any, mesh: Mesh) -> None:
    chain = Chain(Leaf(port(), port(tp=have)), Leaf(port(tp=want), port()))
    with pytest.raises(PlacementError) as caught:
        check(chain, mesh)
    assert "a.y" in caught.value.message and "b.x" in caught.value.message
    assert str(have) in caught.value.message and str(want) in caught.value.message


@pytest.mark.parametrize(
    ("chain", "mesh", "message"),
    [
        (Chain(Leaf(port(), port(16)), Leaf(port(), port())), Mesh(), r"a.y has the shape \(None, 16\), b.x takes"),
        (Chain(Leaf(port(), port(pipe=Shard(0))), Leaf(port(), port())), Mesh(), "a.y names the mesh axis 'pipe'"),
        (Chain(Leaf(port(), port(tp=Shard(2))), Leaf(port(), port())), Mesh(), "a.y has 2 dimensions and cannot"),
        (Chain(Leaf(port(), port(tp=Shard(1))), Leaf(port(), port())), Mesh(tp=3), "a.y: a dimension of 8"),
        (
            Chain(Leaf(port(), Port((None, 8), {"tp": Shard(1)}, pieces=2)), Leaf(port(), port())),
            Mesh(tp=4),
            "a.y: 2 pieces cannot be dealt out evenly to 4 ranks",
        ),
        (Chain(nn.Linear(8, 8), Leaf(port(), port())), Mesh(), r"a \(Linear\) declares no boundary"),
        (
            Chain(Leaf(port(), port()), Leaf(port(), port()), "x -> a.x", "a.z -> b.x", "b.y -> y"),
            Mesh(),
            "a gives no 'z'",
        ),
        (
            Chain(Leaf(port(), port()), Leaf(port(), port()), "x -> a.x", "a.y -> c.x", "b.y -> y"),
            Mesh(),
            "'c.x', which is no module",
        ),
        (Chain(Leaf(port(), port()), Leaf(port(), port()), "x -> a.x", "b.y -> y"), Mesh(), "nothing feeds 'b.x'"),
        (Chain(Leaf(port(), port()), Leaf(port(), port()), "x -> a.x", "a.y -> b.x"), Mesh(), "its output 'y'"),
        (
            Chain(Leaf(port(), port(9)), Leaf(port(), port()), "x -> a.x", "a.y[2:10] -> b.x", "b.y -> y"),
            Mesh(),
            r"a.y is 9 wide and has no part \[2:10\]",
        ),
        (
            Chain(
                Leaf(port(), port(16, tp=Shard(-1))),
                Leaf(port(), port()),
                "x -> a.x",
                "a.y[0:8] -> b.x",
                "b.y -> y",
            ),
            Mesh(),
            "cannot be sliced in that dimension",
        ),
    ],
)
def test_mistakes_are_named(chain: Chain, mesh: Mesh, message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        check(chain, mesh)


def test_a_slice_is_passed_on_and_several_edges_add_up() -> None:
    chain = Chain(
        Leaf(port(), port(12)), Leaf(port(), port()), "x -> a.x", "a.y[4:12] -> b.x", "b.y -> y", "a.y[0:8] -> y"
    )
    assert check(chain, Mesh(tp=2)).edges == 4
    assert chain.boundary.edges[1] == Edge("a.y", "b.x", (4, 12))


def test_parameters_cannot_be_partial() -> None:
    module = linear(8, 8, Split.WHOLE)
    module.boundary = Boundary({"x": port()}, {"y": port()}, {"weight": {"tp": Partial()}})
    with pytest.raises(PlacementError, match="weight is a parameter and cannot be Partial"):
        check(module, Mesh())


def test_edges_are_written_one_way() -> None:
    with pytest.raises(ValueError, match=r"'a\.y - b\.x'"):
        edges("a.y - b.x")


def test_meshes() -> None:
    mesh = Mesh(tp=2, ep=3)
    assert (mesh.size("tp"), mesh.size("ep"), mesh.ranks) == (2, 3, 6)
    assert Mesh().ranks == 1
    with pytest.raises(PlacementError, match="no axis 'pipeline'"):
        Mesh(pipeline=2)
    with pytest.raises(PlacementError, match="has size 0"):
        Mesh(tp=0)


# The models


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_model_is_wired_and_needs_two_reductions_a_layer(pair_of: Callable[..., Any], case: Any) -> None:
    """Megatron's count: one after attention, one after the MLP; for all, the embedding's sum and the logits' gather."""
    model: Model = pair_of(case).model
    report = check(model, Mesh(tp=2))
    kinds = [collective.kind for collective in report.collectives]
    layers = model.config.layers
    assert kinds.count("all_reduce") == 2 * layers + 1
    assert kinds.count("all_gather") == 1
    assert len(kinds) == 2 * layers + 2
    assert check(model, Mesh()).collectives == ()


def test_experts_need_a_reduction_of_their_own_axis(pair_of: Callable[..., Any]) -> None:
    model = pair_of(CASE["v3"]).model  # the first of three layers is dense
    collectives = check(model, Mesh(ep=4)).collectives
    assert [(c.kind, c.source) for c in collectives] == [("all_reduce", "layers.1.y"), ("all_reduce", "layers.2.y")]


def test_heads_stay_whole(pair_of: Callable[..., Any]) -> None:
    with pytest.raises(PlacementError, match=r"layers\.0\.attention\.core\.qkv: 2 pieces .* 4 ranks"):
        check(pair_of(CASE["qwen3-tied"]).model, Mesh(tp=4))
    check(pair_of(CASE["v3"]).model, Mesh(tp=4))  # four heads, one latent for all


def test_a_wrong_declaration_in_a_model_names_both_modules(pair_of: Callable[..., Any]) -> None:
    from tokenrelay.runtime.weights.loader import load_model

    model = load_model(pair_of(CASE["qwen3-tied"]).folder)
    norm = model.layers[1].input_norm
    wanted = Port((None, 64), {"tp": Partial("max")})
    norm.boundary = Boundary({"x": wanted, "residual": Port((None, 64))}, norm.boundary.outputs, {"weight": {}})  # type: ignore[assignment,union-attr]
    with pytest.raises(PlacementError) as caught:
        check(model, Mesh())
    assert "layers.1.x -> layers.1.input_norm.x" in caught.value.message


def test_the_report_is_for_people(pair_of: Callable[..., Any]) -> None:
    text = str(check(pair_of(CASE["qwen3-tied"]).model, Mesh(tp=2)))
    assert text.startswith("Mesh(tp=2): ")
    assert "all_reduce     tp      layers.0.attention.y -> layers.0.post_norm.x" in text

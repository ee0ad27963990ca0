"""Random module graphs with random legal placements: what their programs compute is what one rank computes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from spmd_simulate import piece, simulate
from torch import Tensor, nn

from tokenrelay.base.errors import PlacementError
from tokenrelay.runtime.placement import AXES, Boundary, Mesh, Partial, Placement, Port, Replicate, Shard, edges
from tokenrelay.runtime.placement.compiler import DEFAULT_PASSES, compile_model
from tokenrelay.runtime.placement.cost import CostModel
from tokenrelay.runtime.placement.ir import Add, Call, Move, Part, Program, ReduceNorm, Start, verify

TOKENS, WIDTH = 128, 8  # tokens enough for the pass that cuts norms
MESHES = [Mesh(tp=2), Mesh(tp=4), Mesh(dp=2, tp=2), Mesh(ep=2, tp=2), Mesh(dp=2, ep=2), Mesh(dp=2, cp=2, tp=2), Mesh()]
R, S0, S1, P = Replicate(), Shard(0), Shard(1), Partial()
# What each kind of leaf may do along one axis: (placement of its inputs, of its outputs).
LEGAL: dict[str, list[tuple[Placement, Placement]]] = {
    "tanh": [(R, R), (S0, S0), (S1, S1)],
    "linear": [(R, R), (S0, S0), (R, S1), (S1, P), (P, P)],
    "norm": [(R, R), (S0, S0)],
}


class Leaf(nn.Module):
    """One of LEGAL's kinds with a placement for each axis."""

    def __init__(self, kind: str, ways: dict[str, tuple[Placement, Placement]], seed: int) -> None:
        super().__init__()
        self.kind, self.ways = kind, ways
        self.weight = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        x = Port((None, WIDTH), {axis: way[0] for axis, way in ways.items()})
        y = Port((None, WIDTH), {axis: way[1] for axis, way in ways.items()})
        both = kind == "norm"
        ins, outs = ({"x": x, "residual": x}, {"y": y, "residual": y}) if both else ({"x": x}, {"y": y})
        self.boundary = Boundary(ins, outs, tokenwise=both)

    def compute(self, inputs: dict[str, Tensor], mesh: Mesh, at: dict[str, int]) -> dict[str, Tensor]:
        """What one rank computes; on a mesh of one rank that is the whole."""
        x = inputs["x"]
        if self.kind == "tanh":
            return {"y": x.tanh()}
        if self.kind == "norm":
            total = x + inputs["residual"]
            return {"y": total / (total.pow(2).mean(-1, keepdim=True) + 1).sqrt(), "residual": total}
        weight = self.weight
        for axis in AXES:
            if mesh.size(axis) > 1 and self.ways[axis] in ((R, S1), (S1, P)):
                weight = weight.chunk(mesh.size(axis), 1 if self.ways[axis] == (R, S1) else 0)[at[axis]]
        return {"y": x @ weight}


class Graph(nn.Module):
    """Leaves in a row, each fed by one or two ports of those before it."""

    def __init__(self, leaves: list[Leaf], lines: list[str], y: Port) -> None:
        super().__init__()
        self.leaves = nn.ModuleList(leaves)
        self.boundary = Boundary({"x": Port((None, WIDTH), dict.fromkeys(AXES, R))}, {"y": y}, edges=edges(*lines))


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """A legal graph: a term (Partial) is only passed to where a term is taken."""
    outputs: dict[str, dict[str, Placement]] = {"x": dict.fromkeys(AXES, R)}
    leaves, lines = [], []
    for i in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(sorted(LEGAL)))
        ports = ["x", "residual"] if kind == "norm" else ["x"]
        fed = {p: draw(st.lists(st.sampled_from(sorted(outputs)), min_size=1, max_size=2, unique=True)) for p in ports}
        ways = {}
        for axis in AXES:
            terms = all(outputs[source][axis] == P for sources in fed.values() for source in sources)
            ways[axis] = draw(st.sampled_from([way for way in LEGAL[kind] if way[0] != P or terms]))
        lines += [f"{source} -> leaves.{i}.{port}" for port, sources in fed.items() for source in sources]
        leaves.append(Leaf(kind, ways, i))
        for port in leaves[-1].boundary.outputs:  # type: ignore[union-attr]
            outputs[f"leaves.{i}.{port}"] = {axis: ways[axis][1] for axis in AXES}
    last = f"leaves.{len(leaves) - 1}.y"
    y = Port((None, WIDTH), {axis: draw(st.sampled_from([R, S0, S1])) for axis in AXES})
    return Graph(leaves, [*lines, f"{last} -> y"], y)


def run(graph: Graph, program: Program, x: Tensor) -> list[Tensor]:
    def compute(module: str, inputs: dict[str, Tensor], at: dict[str, int]) -> dict[str, Tensor]:
        leaf = graph.get_submodule(module)
        assert isinstance(leaf, Leaf)
        return leaf.compute(inputs, program.mesh, at)

    return simulate(program, {"x": x}, compute)["y"]


QUICK = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


def shapes_fit(graph: Graph, mesh: Mesh) -> bool:
    """Whether tokens and width can be cut as the ports say: the compiler refuses what cannot, before it lowers."""
    try:
        compile_model(graph, mesh, CostModel(tokens=TOKENS), steps=())
    except PlacementError as error:
        return "cannot be dealt out evenly" not in error.message
    return True


@QUICK
@given(graphs(), st.sampled_from(MESHES), st.booleans())
def test_programs_compute_what_one_rank_does(graph: Graph, mesh: Mesh, optimised: bool) -> None:
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = run(graph, compile_model(graph, Mesh()), x)[0]
    if not shapes_fit(graph, mesh):
        return
    program = compile_model(graph, mesh, CostModel(tokens=TOKENS), steps=DEFAULT_PASSES if optimised else ())
    value = program.values[dict(program.outputs)["y"]]
    for rank, found in enumerate(run(graph, program, x)):
        torch.testing.assert_close(found, piece(expected, value.layouts, mesh, mesh.coordinates(rank)))


@QUICK
@given(graphs(), st.sampled_from(AXES), st.sampled_from([Partial("max"), "term"]))
def test_a_term_where_there_is_none_is_refused_on_every_mesh(graph: Graph, axis: str, kind: Any) -> None:
    leaf = graph.leaves[0]
    assert isinstance(leaf, Leaf)
    port = Port((None, WIDTH), {**dict.fromkeys(AXES, R), axis: P if kind == "term" else kind})
    leaf.boundary = Boundary(dict.fromkeys(leaf.boundary.inputs, port), leaf.boundary.outputs)
    for mesh in MESHES:
        with pytest.raises(PlacementError, match=r"x -> leaves\.0\.(x|residual): x is Replicate\(\) along .* takes"):
            compile_model(graph, mesh, CostModel(tokens=TOKENS))


def mutants(program: Program, move: Move) -> list[Program]:
    """The program with `move` replaced by each other kind, by another dimension or axis, or left out."""
    others = [dataclasses.replace(move, kind=kind) for kind in ("all_reduce", "all_gather", "slice", "reduce_scatter")]
    others += [dataclasses.replace(move, axes=(a,)) for a in AXES if program.mesh.size(a) > 1]
    if move.kind != "all_reduce":
        others.append(dataclasses.replace(move, dim=1 - move.dim))
    made = [_with(program, move, other) for other in others if other != move]
    return [*made, _without(program, move)]


def _with(program: Program, move: Move, other: Move) -> Program:
    def swap(op: Any) -> Any:
        if op == move:
            return other
        return dataclasses.replace(op, move=other) if getattr(op, "move", None) == move else op

    return dataclasses.replace(program, ops=tuple(swap(op) for op in program.ops))


def _without(program: Program, move: Move) -> Program:
    """Whoever read the move's target reads its source."""

    def name(value: str) -> str:
        return move.source if value == move.target else value

    ops: list[Any] = []
    for op in program.ops:
        match op:
            case Call():
                ops.append(dataclasses.replace(op, inputs=tuple((p, name(v)) for p, v in op.inputs)))
            case ReduceNorm() if op.move == move:
                ops.append(dataclasses.replace(op.call, inputs=tuple((p, name(v)) for p, v in op.call.inputs)))
            case Add():
                ops.append(dataclasses.replace(op, sources=tuple(map(name, op.sources))))
            case Part() | Move() if op != move:
                ops.append(dataclasses.replace(op, source=name(op.source)))
            case _ if op != move and getattr(op, "move", None) != move:
                ops.append(op)
    outputs = tuple((port, name(value)) for port, value in program.outputs)
    return dataclasses.replace(program, ops=tuple(ops), outputs=outputs)


@QUICK
@given(graphs(), st.sampled_from([mesh for mesh in MESHES if mesh.ranks > 1]))
def test_a_mutated_collective_is_caught(graph: Graph, mesh: Mesh) -> None:
    if not shapes_fit(graph, mesh):
        return
    program = compile_model(graph, mesh, CostModel(tokens=TOKENS))
    for move in program.moves:
        if any(isinstance(op, Start) and op.move == move for op in program.ops):
            continue  # its readers are elsewhere; `_order` has its own test
        for mutant in mutants(program, move):
            with pytest.raises(PlacementError, match="after mutation"):
                verify(mutant, "mutation")

"""The compiler on whole models: which collectives it issues, its passes, its refusals, and how long it takes."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from tokenrelay.base.errors import CheckpointError, PlacementError
from tokenrelay.runtime.layers.moe import ExpertSplit
from tokenrelay.runtime.models.decoder import Model
from tokenrelay.runtime.models.fields import Fields
from tokenrelay.runtime.models.registry import architecture_of
from tokenrelay.runtime.placement import Boundary, Mesh, Partial, Port, Replicate, Shard, edges
from tokenrelay.runtime.placement.compiler import compile_model
from tokenrelay.runtime.placement.convert import Converter
from tokenrelay.runtime.placement.cost import CostModel
from tokenrelay.runtime.placement.ir import Call, Move, Program, ReduceNorm, Start, Value, Wait, verify
from tokenrelay.runtime.placement.stages import cut_stages
from tokenrelay.runtime.spmd.plan import make_plan

CONFIGS = Path(__file__).parent / "configs"


def meta_model(name: str) -> Model:
    _, architecture = architecture_of(Fields.read(CONFIGS / f"{name}.json"))
    with torch.device("meta"):
        return Model(architecture, dtype=torch.bfloat16)


def kinds(program: Program, layer: int) -> list[str]:
    found = []
    for op in program.ops:
        if isinstance(op, ReduceNorm) and op.call.module.startswith(f"layers.{layer}."):
            found.append("all_reduce+norm")
        elif isinstance(op, Move) and op.source.startswith(f"layers.{layer}."):
            found.append(op.kind)
    return found


@pytest.mark.parametrize("name", ["deepseek_v3", "kimi_k2"])
def test_a_tp_layer_issues_what_is_written_by_hand(name: str) -> None:
    """Megatron-LM's two reductions a layer, each one operation with the residual addition and the norm behind it."""
    program = compile_model(meta_model(name), Mesh(tp=4), CostModel(tokens=4))
    for layer in (0, 1, 30, 60):
        assert kinds(program, layer) == ["all_reduce+norm"] * (1 if layer == 0 else 2)
    assert Counter(move.kind for move in program.moves) == {"all_reduce": 123, "all_gather": 1}


def test_many_tokens_are_cut_around_the_norms() -> None:
    program = compile_model(meta_model("deepseek_v3"), Mesh(tp=4), CostModel(tokens=4096))
    assert kinds(program, 30) == ["all_gather", "reduce_scatter", "all_gather", "reduce_scatter"]
    moved = [move for move in program.moves if move.source.startswith("layers.30.")]
    assert not any("residual" in move.source for move in moved), "the residual stream stays cut from layer to layer"


def test_one_rank_needs_nothing() -> None:
    assert compile_model(meta_model("kimi_k2"), Mesh()).moves == []


@pytest.mark.parametrize("name", ["deepseek_v3", "kimi_k2"])
@pytest.mark.parametrize(
    ("mesh", "experts"),
    [(Mesh(tp=4), ""), (Mesh(dp=8, tp=8), "send,whole"), (Mesh(pp=2, dp=2, cp=2, ep=2, tp=4), "cut")],
)
def test_plans_of_large_models_take_under_two_seconds(name: str, mesh: Mesh, experts: str) -> None:
    plan = make_plan(CONFIGS / f"{name}.json", mesh, CostModel(tokens=4096), experts=ExpertSplit.parse(experts))
    assert plan.compile_s < 2, "61 layers"
    layers = sum(group.count for group in plan.groups if group.name.startswith("layer"))
    assert layers == 61 and len(plan.groups) < 10
    middle = max(plan.groups, key=lambda group: group.count)
    assert middle.sent_bytes > 0 and middle.move_s > 0 and middle.compute_s > 0


def test_bytes_of_a_plan_are_the_formula() -> None:
    plan = make_plan(CONFIGS / "deepseek_v3.json", Mesh(tp=4), CostModel(tokens=4))
    middle = max(plan.groups, key=lambda group: group.count)
    assert [move.how for move in middle.moves] == ["fused", "fused"]
    assert middle.sent_bytes / 4 == 2 * (2 * 3 / 4 * 7168 * 2), "two ring reductions of 7168 bfloat16 a token"
    held = sum(group.weight_bytes * group.count for group in plan.groups)
    assert held == pytest.approx(671e9 * 2 / 4, rel=0.02), "DeepSeek-V3 has 671 billion parameters"


def test_widths_that_do_not_divide_are_one_sentence() -> None:
    for mesh, message in (
        (Mesh(ep=3), r"experts\.w_gate_up: a dimension of 256 cannot be dealt out evenly to 3 ranks \(Mesh\(ep=3\)\)"),
        (Mesh(tp=256), r"128 pieces cannot be dealt out evenly to 256 ranks"),
        (Mesh(tp=3), "cannot be dealt out evenly to 3 ranks"),
    ):
        with pytest.raises(PlacementError, match=message) as caught:
            compile_model(meta_model("deepseek_v3"), mesh)
        assert "\n" not in caught.value.message
    with pytest.raises(PlacementError, match="62 pipeline stages, and the model has 61 layers"):
        make_plan(CONFIGS / "kimi_k2.json", Mesh(pp=62), CostModel())
    with pytest.raises(PlacementError, match="by send, whole, cut and spare:N, not by scatter"):
        ExpertSplit.parse("send, scatter")
    with pytest.raises(PlacementError, match="leave dp among the axes"):
        ExpertSplit.parse("send, cut")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        make_plan(CONFIGS / "none.json", Mesh(), CostModel())
    with pytest.raises(PlacementError, match="4 tokens cannot be dealt out to 8 ranks"):
        make_plan(CONFIGS / "kimi_k2.json", Mesh(dp=8), CostModel(tokens=4))


# -- conversions -------------------------------------------------------------------------------------------------------
def path(have: tuple[object, ...], want: tuple[object, ...], mesh: Mesh, **cost: float) -> list[tuple[str, object]]:
    value = Value("v", (None, 4096), have)  # type: ignore[arg-type]
    model = CostModel(**{"tokens": 4096, **cost})  # type: ignore[arg-type]
    found = Converter(mesh, model).path(value, want)  # type: ignore[arg-type]
    assert found is not None
    return [(move.kind, move.axes) for move in found]


R, S0, S1, P = Replicate(), Shard(0), Shard(1), Partial()


def test_the_cheapest_sequence_follows_the_links() -> None:
    both = Mesh(dp=2, tp=4)
    assert path((P, R, R, P), (R, R, R, R), both, tokens=8) == [("all_reduce", ("dp", "tp"))], (
        "one latency for few tokens"
    )
    first = path((P, R, R, P), (S0, R, R, R), Mesh(dp=8, tp=8), host_ranks=8, tokens=65536)[0]
    assert first == ("reduce_scatter", ("tp",)), "the fast link first: fewer bytes on the slow one"
    assert path((S0, R, R, S0), (R, R, R, R), both) == [("all_gather", ("tp",)), ("all_gather", ("dp",))], (
        "innermost first"
    )
    assert path((R, R, R, S0), (R, R, R, S1), Mesh(tp=4)) == [("all_to_all", ("tp",))]


# -- passes ------------------------------------------------------------------------------------------------------------
class Leaf(nn.Module):
    """Only a boundary."""

    def __init__(self, x: Port, y: Port) -> None:
        super().__init__()
        self.boundary = Boundary({"x": x}, {"y": y})


class Branches(nn.Module):
    """a's sum is needed by c alone; b could run meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        whole, term = Port((None, 8)), Port((None, 8), {"tp": P})
        self.a, self.c, self.b, self.d = Leaf(whole, term), Leaf(whole, whole), Leaf(whole, whole), Leaf(whole, whole)
        self.boundary = Boundary(
            {"x": whole},
            {"y": whole},
            edges=edges("x -> a.x", "a.y -> c.x", "x -> b.x", "c.y -> d.x", "b.y -> d.x", "d.y -> y"),
        )


def test_collectives_leave_the_critical_path() -> None:
    ops = compile_model(Branches(), Mesh(tp=2)).ops
    names = [op.module if isinstance(op, Call) else type(op).__name__ for op in ops]
    start, wait = names.index("Start"), names.index("Wait")
    assert start == names.index("a") + 1 and start < names.index("b") < wait < names.index("c")


def test_the_specification_knows_each_rule() -> None:
    program = compile_model(Branches(), Mesh(tp=2))
    broken = {
        "_order": [op for op in program.ops if not isinstance(op, Wait)],
        "again": [*program.ops, program.ops[0]],
        "started": [op for op in program.ops if not isinstance(op, Start)],
    }
    for what, ops in broken.items():
        with pytest.raises(PlacementError, match="after a test"):
            verify(dataclasses.replace(program, ops=tuple(ops)), "a test")
        assert what


def test_experts_that_are_sent_to_stay_so() -> None:
    """Without its exchange a call would compute with the rank's own experts alone: the specification says no."""
    _, architecture = architecture_of(Fields.read(CONFIGS / "deepseek_v3.json"))
    with torch.device("meta"):
        model = Model(architecture, experts=ExpertSplit.parse("send"), dtype=torch.bfloat16)
    program = compile_model(model, Mesh(dp=2, ep=2), CostModel(tokens=2))
    sent = [op for op in program.ops if isinstance(op, Call) and op.sends]
    assert len(sent) == 58 and {op.sends for op in sent} == {("dp",)}
    ops = tuple(dataclasses.replace(op, sends=()) if op is sent[7] else op for op in program.ops)
    with pytest.raises(PlacementError, match=r"does not send as layers\.10\.mlp\.experts declares"):
        verify(dataclasses.replace(program, ops=ops), "a test")


@pytest.mark.parametrize("mesh", [Mesh(pp=2, tp=2), Mesh(pp=4, dp=2)], ids=str)
def test_stages_are_the_program(mesh: Mesh) -> None:
    program = compile_model(meta_model("deepseek_v3"), mesh, CostModel(tokens=mesh.size("dp")))
    stages = cut_stages(program, 61)
    assert tuple(op for stage in stages for op in stage.ops) == program.ops
    for before, behind in itertools.pairwise(stages):
        assert before.outputs == behind.inputs and len(behind.inputs) == 2, (
            "the residual stream and what is added to it"
        )
    layers = [
        {op.module.split(".")[1] for op in s.ops if isinstance(op, Call) and "layers." in op.module} for s in stages
    ]
    assert not set.intersection(*layers) and max(map(len, layers)) - min(map(len, layers)) <= 1


def test_a_stacked_shard_is_not_converted() -> None:
    chain = Branches()
    chain.a.boundary = Boundary(chain.a.boundary.inputs, {"y": Port((None, 8), {"tp": S1}, stacked=2)})
    with pytest.raises(PlacementError, match=r"a\.y -> c\.x: .*stacked"):
        compile_model(chain, Mesh(tp=2))


def test_compiling_is_quick_enough_to_do_it_at_every_start() -> None:
    model = meta_model("kimi_k2")
    started = time.process_time()
    compile_model(model, Mesh(tp=8))
    assert time.process_time() - started < 2

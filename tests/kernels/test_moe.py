"""Routing and experts, every path against a float64 oracle that walks tokens one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import close, each_path, paths
from moe_oracles import ROUTES, moe_inputs, moe_oracle, route_oracle

from tokenrelay.kernels import cpu, ops, registry


@each_path("moe")
@pytest.mark.parametrize(
    ("tokens", "top_k", "count", "width", "hidden"),
    [
        (1, 2, 8, 64, 32),
        (7, 3, 5, 100, 50),
        (0, 2, 4, 64, 32),
        (33, 2, 3, 48, 70),
        (200, 2, 4, 64, 32),
        (2, 1, 1, 17, 9),
    ],
)
def test_moe(path: str, dtype: torch.dtype, tokens: int, top_k: int, count: int, width: int, hidden: int) -> None:
    inputs = moe_inputs(tokens, top_k, count, width, hidden, dtype)
    with registry.force("moe", path):
        close(ops.moe(*inputs), moe_oracle(*inputs))


@each_path("moe")
@pytest.mark.parametrize("tokens", [9, 300])  # few: our product; many: torch's
def test_choices_that_live_elsewhere_are_skipped(path: str, dtype: torch.dtype, tokens: int) -> None:
    inputs = moe_inputs(tokens, 2, 4, 32, 16, dtype)
    inputs[1][::2, 0] = -1
    inputs[1][1] = -1
    inputs[3][2], inputs[4][2] = float("nan"), float("nan")  # an expert nobody chose is not read
    inputs[1][inputs[1] == 2] = 3
    with registry.force("moe", path):
        close(ops.moe(*inputs), moe_oracle(*inputs))


@each_path("moe", reference=False)
def test_a_token_does_not_depend_on_its_neighbours_nor_on_threads(path: str, dtype: torch.dtype) -> None:
    inputs = moe_inputs(90, 3, 6, 80, 40, dtype)
    before = cpu.threads()
    try:
        with registry.force("moe", path):
            whole = ops.moe(*inputs)
            cpu.set_threads(3)
            assert torch.equal(ops.moe(*inputs), whole)
            for token in (0, 41, 89):
                one = [x[token : token + 1] for x in inputs[:3]]
                assert torch.equal(ops.moe(*one, *inputs[3:])[0], whole[token])
    finally:
        cpu.set_threads(before)


def test_bad_moe_input() -> None:
    inputs = moe_inputs(3, 2, 4, 32, 16, torch.float32)
    wrong = inputs[1].clone()
    wrong[1, 0] = 4
    with pytest.raises(ValueError, match="token 1 chose expert 4 of 4"):
        ops.moe(inputs[0], wrong, *inputs[2:])
    with pytest.raises(ValueError, match="w_gate_up has shape"):
        ops.moe(*inputs[:3], inputs[3][:, :-1], inputs[4])
    with pytest.raises(ValueError, match=r"experts is torch\.int64"):
        ops.moe(inputs[0], inputs[1].long(), *inputs[2:])


@pytest.mark.parametrize("path", ["ref/torch", *paths("moe_route")])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("options", ROUTES)
def test_moe_route(path: str, biased: bool, options: dict[str, Any]) -> None:
    logits = torch.randn(40, 64) * 3
    bias = torch.randn(64) * 0.2 if biased else None
    with registry.force("moe_route", path):
        experts, weights = ops.moe_route(logits, bias, **options)
        assert ops.moe_route(logits[:0], bias, **options)[0].shape == (0, options["top_k"])
    expected, expected_weights = route_oracle(logits, bias, options)
    assert experts.dtype is torch.int32
    assert experts.tolist() == expected
    close(weights, torch.tensor(expected_weights, dtype=torch.float64))


@pytest.mark.parametrize("path", ["ref/torch", *paths("moe_route")])
def test_equal_scores_take_the_lower_expert(path: str) -> None:
    logits = torch.zeros(1, 16)
    with registry.force("moe_route", path):
        experts, _ = ops.moe_route(logits, None, top_k=3, groups=4, groups_top_k=2, scoring="sigmoid", normalize=True)
    assert experts.tolist() == [[0, 1, 2]]


@settings(max_examples=30, deadline=None)
@given(
    groups=st.sampled_from([1, 2, 4]),
    size=st.integers(2, 20),
    scoring=st.sampled_from(["softmax", "sigmoid"]),
    top2=st.booleans(),
    path=st.sampled_from(paths("moe_route")),
    data=st.data(),
)
def test_moe_route_any_shape(groups: int, size: int, scoring: str, top2: bool, path: str, data: st.DataObject) -> None:
    groups_top_k = data.draw(st.integers(1, groups))
    open_experts = size * (groups_top_k if groups > 1 else 1)
    options: dict[str, Any] = {
        "top_k": data.draw(st.integers(1, open_experts)),
        "groups": groups,
        "groups_top_k": groups_top_k,
        "scoring": scoring,
        "normalize": True,
        "group_score": "top2" if top2 else "max",
    }
    logits = torch.randn(3, groups * size)
    with registry.force("moe_route", path):
        experts, weights = ops.moe_route(logits, None, **options)
    expected, expected_weights = route_oracle(logits, None, options)
    assert experts.tolist() == expected
    close(weights, torch.tensor(expected_weights, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 9}, "top_k"),
        ({"groups": 3}, "multiple of groups"),
        ({"groups": 4, "groups_top_k": 5}, "groups_top_k"),
        ({"groups": 4, "groups_top_k": 1, "top_k": 3}, "top_k"),
        ({"scoring": "tanh"}, "tanh"),
    ],
)
def test_bad_routes_are_refused(options: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"top_k": 2, "groups": 1, "groups_top_k": 1, "scoring": "softmax", "normalize": True}
    with pytest.raises(ValueError, match=message):
        ops.moe_route(torch.zeros(1, 8), None, **(good | options))

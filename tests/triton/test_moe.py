"""Experts in Triton against a float64 oracle that walks tokens one by one; float8 weights against what they hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import close
from moe_oracles import ROUTES, moe_inputs, moe_oracle, route_oracle
from torch import Tensor
from triton_cases import DEVICE, pick

from tokenrelay.kernels import ops, registry
from tokenrelay.kernels.scaled import BlockScaledWeight
from tokenrelay.kernels.triton import moe, scaled

TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
MODES = pytest.mark.parametrize("fixed", [False, True], ids=["grouped", "fixed"])


@MODES
@TYPES
@pytest.mark.parametrize(
    ("tokens", "top_k", "count", "width", "hidden"),
    [(1, 2, 8, 64, 32), pick((20, 3, 3, 72, 40), (2000, 8, 32, 2048, 512)), (0, 2, 4, 64, 32)],
)
def test_moe(fixed: bool, dtype: torch.dtype, tokens: int, top_k: int, count: int, width: int, hidden: int) -> None:
    inputs = moe_inputs(tokens, top_k, count, width, hidden, dtype)
    there = [x.to(DEVICE) for x in inputs]
    close(moe.moe(fixed, *there).cpu(), moe_oracle(*inputs))


@TYPES
def test_choices_that_live_elsewhere_are_skipped(dtype: torch.dtype) -> None:
    inputs = moe_inputs(9, 2, 4, 32, 16, dtype)
    inputs[1][::2, 0] = -1
    inputs[1][1] = -1
    inputs[3][2], inputs[4][2] = float("nan"), float("nan")  # an expert nobody chose is not read
    inputs[1][inputs[1] == 2] = 3
    close(moe.moe(False, *(x.to(DEVICE) for x in inputs)).cpu(), moe_oracle(*inputs))
    inputs[1][:] = -1
    assert not moe.moe(False, *(x.to(DEVICE) for x in inputs)).any()


@TYPES
def test_fixed_tiles_make_tokens_independent(dtype: torch.dtype) -> None:
    inputs = [x.to(DEVICE) for x in moe_inputs(12, 3, 4, 64, 32, dtype)]
    whole = moe.moe(True, *inputs)
    for token in (0, 11):
        one = [x[token : token + 1] for x in inputs[:3]]
        assert torch.equal(moe.moe(True, *one, *inputs[3:])[0], whole[token])


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("options", [*ROUTES, {**ROUTES[0], "groups": 1, "top_k": 1, "normalize": False, "scale": 2.5}])
def test_routes(biased: bool, options: dict[str, Any]) -> None:
    logits = torch.randn(6, 64) * 3
    bias = torch.randn(64) * 0.2 if biased else None
    full = {"groups": 1, "groups_top_k": 1, "scale": 1.0, "group_score": "max", **options}
    experts, weights = moe.moe_route(logits.to(DEVICE), None if bias is None else bias.to(DEVICE), **full)
    expected, expected_weights = route_oracle(logits, bias, options)
    assert experts.tolist() == expected
    close(weights.cpu(), torch.tensor(expected_weights, dtype=torch.float64))


def test_routes_of_odd_groups_and_ties() -> None:
    options = {"top_k": 3, "groups": 5, "groups_top_k": 2, "scoring": "sigmoid", "normalize": True}
    full = {**options, "scale": 1.0, "group_score": "top2"}
    logits = torch.randn(4, 35)
    experts, _ = moe.moe_route(logits.to(DEVICE), None, **full)
    assert experts.tolist() == route_oracle(logits, None, full)[0]
    tied, _ = moe.moe_route(torch.zeros(1, 35, device=DEVICE), None, **full)
    assert tied.tolist() == [[0, 1, 2]]
    for change, message in (({"groups": 4}, "multiple of groups"), ({"top_k": 15}, "top_k"), ({"scoring": "x"}, "'x'")):
        with pytest.raises(ValueError, match=message):
            moe.moe_route(logits.to(DEVICE), None, **{**full, **change})


@pytest.mark.parametrize("choices", [(1, 1), (9, 4), (50, 2)])
def test_few_choices_are_grouped_as_many_are(monkeypatch: pytest.MonkeyPatch, choices: tuple[int, int]) -> None:
    experts = torch.randint(-1, 7, choices, dtype=torch.int32, device=DEVICE)
    few = moe._group(experts, 6, 16)  # 6 is no expert: it lives nowhere
    monkeypatch.setattr(moe, "GROUPED_CHOICES_MAX", 0)
    many = moe._group(experts, 6, 16)
    assert few.tiles == many.tiles
    assert few.order.tolist() == many.order.tolist()
    assert few.offsets.tolist() == many.offsets.tolist()
    assert few.tile_expert.tolist() == many.tile_expert.tolist()
    real = few.tile_expert < 6
    assert few.tile_first[real].tolist() == many.tile_first[real].tolist()


def scaled_inputs(tokens: int, count: int, width: int, hidden: int) -> tuple[list[Tensor], list[BlockScaledWeight]]:
    x, chosen, weights, gate_up, down = moe_inputs(tokens, 2, count, width, hidden, torch.bfloat16)
    gate_up[0] *= 20  # blocks differ
    return [x, chosen, weights], [BlockScaledWeight.of(gate_up), BlockScaledWeight.of(down)]


@MODES
def test_float8_weights_and_activations(fixed: bool) -> None:
    """The error is that of activations with three bits of mantissa, twice: 2^-4 each at worst, far less on average."""
    tokens, (leading, small) = 5, scaled_inputs(5, 2, pick(160, 1024), pick(136, 384))
    expected = moe_oracle(*leading, *(w.dequantize() for w in small))
    there = [BlockScaledWeight(w.data.to(DEVICE), w.factors.to(DEVICE)) for w in small]
    actual = moe.scaled_moe(fixed, *(x.to(DEVICE) for x in leading), *there).cpu().double()
    assert actual.shape == (tokens, leading[0].shape[1])
    assert float((actual - expected).norm() / expected.norm()) < 0.05
    with registry.force("scaled_moe", "ref/torch"):
        close(ops.scaled_moe(*leading, *small), expected)


def test_quantized_activations_are_the_nearest() -> None:
    x = torch.randn(3, 300, device=DEVICE) * 50
    x[1, :128] = 0
    small, factors = scaled.quantize(x)
    spread = factors.repeat_interleave(128, 1)[:, :300]
    wide = small.float() * spread
    assert float((wide - x).abs().max() / x.abs().max()) <= 2**-4
    assert float(small.float().abs().amax()) == 448.0
    assert factors[1, 0] == 1.0


def test_block_scaled_weights() -> None:
    weight = torch.randn(2, 200, 300)
    small = BlockScaledWeight.of(weight)
    assert small.factors.shape == (2, 2, 3)
    assert float((small.dequantize() - weight).abs().max() / weight.abs().max()) <= 2**-4
    with pytest.raises(ValueError, match="factors has shape"):
        BlockScaledWeight(small.data, small.factors[:, :1])
    with pytest.raises(ValueError, match=r"data is torch\.float32"):
        BlockScaledWeight(weight, small.factors)


def test_bad_tensors_are_refused() -> None:
    inputs = [x.to(DEVICE) for x in moe_inputs(3, 2, 4, 32, 16, torch.float32)]
    with pytest.raises(ValueError, match="w_gate_up has shape"):
        moe.moe(False, *inputs[:3], inputs[3][:, :-1], inputs[4])
    with pytest.raises(ValueError, match=r"experts is torch\.int64"):
        moe.moe(False, inputs[0], inputs[1].long(), *inputs[2:])
    with pytest.raises(ValueError, match="x has shape"):
        moe.moe(False, inputs[0][:2], *inputs[1:])

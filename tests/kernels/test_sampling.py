"""Sampling: bit-equal on all paths, the right distribution, the filters' definitions; log-probabilities; penalties."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import close, paths
from torch import Tensor

from tokenrelay.kernels import _cpu, cpu, isa, ops, registry
from tokenrelay.kernels.batch import PenaltyBatch, SamplingBatch
from tokenrelay.kernels.cpu.variants import VARIANTS, Variant
from tokenrelay.kernels.ref.sampling import WEIGHT_ONE, philox, token_weights

NATIVE = paths("sample")
ALL = ["ref/torch", *NATIVE]


def params(
    rows: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int = 7,
    choice: int = 0,
) -> SamplingBatch:
    """The same settings for all rows; rows differ in their position."""
    return SamplingBatch(
        temperature=torch.full((rows,), temperature),
        top_p=torch.full((rows,), top_p),
        top_k=torch.full((rows,), top_k, dtype=torch.int32),
        min_p=torch.full((rows,), min_p),
        seed=torch.full((rows,), seed, dtype=torch.int64),
        choice=torch.full((rows,), choice, dtype=torch.int32),
        position=torch.arange(rows),
    )


def draw(path: str, logits: Tensor, batch: SamplingBatch) -> Tensor:
    with registry.force("sample", path):
        tokens = ops.sample(logits, batch)
    assert tokens.dtype is torch.int64
    return tokens


def plain_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox-4x32-10 in Python's whole numbers."""
    for _ in range(10):
        a, b = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [b >> 32 ^ counter[1] ^ key[0], b & 0xFFFFFFFF, a >> 32 ^ counter[3] ^ key[1], a & 0xFFFFFFFF]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


def test_philox() -> None:
    """The oracle gives the known answers of the Random123 library, the reference gives the oracle's."""
    full = 0xFFFFFFFF
    assert plain_philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert plain_philox([full] * 4, [full] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    assert plain_philox(pi, [0xA4093822, 0x299F31D0]) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]
    seeds, choices, positions = (
        [0, 1, -1, 1 << 62, -(1 << 63)],
        [0, 5, 127, 2**31 - 1, 1],
        [0, 9, 1 << 40, 7, 2**63 - 1],
    )
    for index, number in enumerate(philox(torch.tensor(seeds), torch.tensor(choices), torch.tensor(positions))):
        seed, position = seeds[index] % (1 << 64), positions[index]
        words = plain_philox([position & full, position >> 32, choices[index], 0], [seed & full, seed >> 32])
        assert number == words[0] | words[1] << 32


def test_weights_are_exponentials() -> None:
    logits = torch.cat((torch.linspace(-40, 0, 1001), torch.tensor([-math.inf, -1e30])))
    weights = token_weights(logits, 0.7)
    exact = ((logits.double()) / float(torch.tensor(0.7))).exp() * WEIGHT_ONE
    assert weights.max() == WEIGHT_ONE
    assert bool(((weights.double() - (logits.double() / 0.7).exp() * WEIGHT_ONE).abs() <= 1 + 1e-12 * exact).all())


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.isa <= isa.features()], ids=lambda v: v.name)
@pytest.mark.parametrize("temperature", [0.01, 0.7, 1.0, 3.0])
def test_native_weights_equal_the_reference_bit_for_bit(variant: Variant, temperature: float) -> None:
    """A fused multiply-add, another order of terms or another rounding would show here."""
    # A last bit in float64 turns about one in 10^5 of the larger weights, so many of those are needed.
    wide = torch.cat((torch.linspace(-35, 0, 20_011), torch.linspace(-2, 0, 600_003))) * temperature
    logits = torch.cat((wide, torch.randn(5000) * temperature, torch.tensor([0.0, -0.0, -math.inf, -3e38])))
    expected = token_weights(logits, float(torch.tensor(temperature)))
    actual = torch.empty_like(expected)
    total = _cpu.token_weights(variant.code, len(logits), logits.data_ptr(), temperature, actual.data_ptr())
    assert torch.equal(actual, expected)
    assert total == int(expected.sum())


@settings(max_examples=60, deadline=None)
@given(
    vocab=st.one_of(st.integers(1, 70), st.integers(4000, 9000)),
    temperature=st.sampled_from([0.0, 1e-6, 0.3, 1.0, 2.5, 100.0]),
    top_p=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.999, 1.0]),
    top_k=st.sampled_from([-1, 0, 1, 3, 50, 5000, 100_000]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    coarse=st.booleans(),
    holes=st.booleans(),
    seed=st.integers(-(2**63), 2**63 - 1),
    path=st.sampled_from(NATIVE),
)
def test_native_tokens_equal_the_reference(
    vocab: int,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    coarse: bool,
    holes: bool,
    seed: int,
    path: str,
) -> None:
    logits = torch.randn(6, vocab, generator=torch.Generator().manual_seed(seed & 0xFFFF)) * 4
    if coarse:
        logits = logits.round()  # many ties
    if holes:
        logits[:, ::3] = -math.inf
        logits[1] = float("nan")
        logits[2, vocab // 2] = math.inf
        logits[3] = -math.inf
    batch = params(6, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed)
    assert draw(path, logits, batch).tolist() == draw("ref/torch", logits, batch).tolist()


@pytest.mark.parametrize("path", NATIVE)
def test_native_tokens_equal_the_reference_with_a_large_vocabulary(path: str) -> None:
    logits = torch.randn(3, 160_001) * 3
    for settings_ in ({}, {"top_p": 0.95}, {"top_k": 40, "top_p": 0.8}, {"min_p": 0.02}, {"temperature": 0.0}):
        batch = params(3, **settings_)
        assert torch.equal(draw(path, logits, batch), draw("ref/torch", logits, batch))


@pytest.mark.parametrize("path", ALL)
def test_distribution(path: str) -> None:
    """Chi-square over 20,000 draws against softmax(logits / T); the bound is passed by chance once in 10^6."""
    rows = 20_000 if path != "ref/torch" else 2_000
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5, -math.inf, 0.5, -2.0])
    batch = params(rows, temperature=0.8, seed=1234)
    counts = torch.bincount(draw(path, logits.expand(rows, -1).contiguous(), batch), minlength=8).double()
    expected = torch.softmax(logits.double() / 0.8, dim=-1) * rows
    assert counts[5] == 0
    live = expected > 0
    assert float(((counts - expected)[live].square() / expected[live]).sum()) < 41.5  # 6 degrees: p = 2.3e-7


@pytest.mark.parametrize("path", NATIVE)
def test_filters_keep_the_right_tokens(path: str) -> None:
    """Over many draws exactly the tokens that the definition keeps appear."""
    probabilities = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])
    logits = probabilities.log().expand(4000, -1).contiguous()

    def seen(**settings_: float) -> set[int]:
        return set(draw(path, logits, params(4000, **settings_)).tolist())  # type: ignore[arg-type]

    assert seen() == {0, 1, 2, 3, 4}
    assert seen(top_k=2) == {1, 3}
    assert seen(top_p=0.5) == {1, 3}
    assert seen(top_p=0.39) == {1}
    assert seen(top_p=0.0) == {1}
    assert seen(min_p=0.26) == {1, 3, 4}  # at least 0.104
    assert seen(min_p=1.0) == {1}
    assert seen(top_k=3, top_p=0.8) == {1, 3, 4}  # of 0.85 kept, 0.65 is less than 0.8 * 0.85
    assert seen(top_k=3, top_p=0.75) == {1, 3}
    assert seen(temperature=0.0) == {1}


@pytest.mark.parametrize("path", ALL)
def test_ties_and_nothing(path: str) -> None:
    inf, nan = math.inf, math.nan
    logits = torch.tensor([[1.0, 3.0, 3.0, nan], [nan, nan, nan, nan], [-inf, -inf, -inf, -inf], [0.0, inf, inf, 1.0]])
    for temperature in (0.0, -1.0):
        assert draw(path, logits, params(4, temperature=temperature)).tolist() == [1, 0, 0, 1]
    hot = draw(path, logits, params(4, temperature=1.0)).tolist()
    assert hot[1] == hot[2] == 0
    assert hot[3] in (1, 2)
    assert draw(path, logits[:0], params(0)).shape == (0,)
    same = torch.zeros(1, 9)
    assert draw(path, same, params(1, top_k=1)).tolist() == [0]


@pytest.mark.parametrize("path", ALL)
def test_random_numbers_are_keyed_by_seed_choice_and_position_only(path: str) -> None:
    logits = torch.randn(1, 500).expand(64, -1).contiguous()
    whole = draw(path, logits, params(64))
    assert draw(path, logits[:10], params(10)).tolist() == whole[:10].tolist()  # whatever stands beside it
    for other in (params(64, seed=8), params(64, choice=1)):
        different = draw(path, logits, other)
        assert (different == whole).float().mean() < 0.2
    assert whole.unique().numel() > 30


@pytest.mark.parametrize("path", NATIVE)
def test_sampling_does_not_depend_on_threads(path: str) -> None:
    logits, batch, before = torch.randn(40, 3000), params(40, top_p=0.9), cpu.threads()
    results = []
    try:
        for count in (1, 2, 5):
            cpu.set_threads(count)
            results.append(draw(path, logits, batch).tolist())
    finally:
        cpu.set_threads(before)
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("path", ["ref/torch", *paths("token_logprobs")])
@pytest.mark.parametrize("vocab", [1, 7, 64, 1000, 50_021])
def test_token_logprobs(path: str, vocab: int) -> None:
    logits = (torch.randn(3, vocab) * 5).round(decimals=1)  # with ties
    tokens = torch.randint(vocab, (3,))
    top_k = min(5, vocab)
    with registry.force("token_logprobs", path):
        chosen, ids, top = ops.token_logprobs(logits, tokens, top_k)
        assert ops.token_logprobs(logits, tokens, 0)[1].shape == (3, 0)
        assert ops.token_logprobs(logits[:0], tokens[:0], top_k)[2].shape == (0, top_k)
    wide = logits.double()
    truth = wide - wide.exp().sum(-1, keepdim=True).log()
    assert bool(((chosen - truth[torch.arange(3), tokens]).abs() < 1e-5).all())
    for row in range(3):
        order = sorted(range(vocab), key=lambda i: (-float(logits[row, i]), i))[:top_k]
        assert ids[row].tolist() == order
        assert bool(((top[row] - truth[row, order]).abs() < 1e-5).all())


@pytest.mark.parametrize("path", ["ref/torch", *paths("token_logprobs")])
def test_logprobs_of_forbidden_tokens(path: str) -> None:
    logits = torch.tensor([[0.0, -math.inf, 0.0]])
    with registry.force("token_logprobs", path):
        chosen, ids, top = ops.token_logprobs(logits, torch.tensor([1]), 3)
    assert chosen.tolist() == [-math.inf]
    assert ids.tolist() == [[0, 2, 1]]
    assert top.tolist() == [[pytest.approx(-math.log(2)), pytest.approx(-math.log(2)), -math.inf]]


def penalize(
    logits: Tensor,
    row: int,
    prompt: list[int],
    output: list[int],
    presence: float,
    frequency: float,
    repetition: float,
    bias: dict[int, float],
) -> None:
    """The oracle, in Python numbers, in place."""
    for token in {*prompt, *output}:
        value = float(logits[row, token])
        value = value / repetition if value > 0 else value * repetition
        count = Counter(output)[token]
        logits[row, token] = value - frequency * count - (presence if count else 0.0)
    for token, amount in bias.items():
        logits[row, token] += amount


@pytest.mark.parametrize("path", ["ref/torch", *paths("apply_penalties")])
def test_penalties(path: str) -> None:
    vocab = 50
    logits = torch.randn(5, vocab) * 3
    cases = [
        (3, [1, 2, 3, 2], [5, 5, 2, 9], 0.5, 0.25, 1.3, {7: -100.0, 5: 2.0}),
        (0, [], [], 1.0, 1.0, 2.0, {4: 1.5}),
        (4, [8, 8], [], 1.0, 1.0, 1.1, {}),
    ]
    expected = logits.double()
    rows, settings_, seen, counts, offsets, bias_ids, bias, bias_offsets = [], [], [], [], [0], [], [], [0]
    for row, prompt, output, presence, frequency, repetition, biases in cases:
        penalize(expected, row, prompt, output, presence, frequency, repetition, biases)
        distinct = list(dict.fromkeys(prompt + output))
        rows.append(row)
        settings_.append((presence, frequency, repetition))
        seen += distinct
        counts += [Counter(output)[token] for token in distinct]
        offsets.append(len(seen))
        bias_ids += biases.keys()
        bias += biases.values()
        bias_offsets.append(len(bias))
    presence_, frequency_, repetition_ = (torch.tensor(column) for column in zip(*settings_, strict=True))
    batch = PenaltyBatch(
        torch.tensor(rows),
        presence_,
        frequency_,
        repetition_,
        torch.tensor(offsets),
        torch.tensor(seen),
        torch.tensor(counts, dtype=torch.int32),
        torch.tensor(bias_offsets),
        torch.tensor(bias_ids),
        torch.tensor(bias),
    )
    untouched = logits[[1, 2]].clone()
    with registry.force("apply_penalties", path):
        ops.apply_penalties(logits, batch)
    close(logits, expected)
    assert torch.equal(logits[[1, 2]], untouched)


def test_bad_sampling_input() -> None:
    with pytest.raises(ValueError, match="temperature has shape"):
        ops.sample(torch.zeros(2, 8), params(3))
    with pytest.raises(ValueError, match="empty vocabulary"), registry.force("sample", NATIVE[0]):
        from tokenrelay.kernels.cpu.sampling import sample

        sample(0, torch.zeros(1, 0), params(1))
    with pytest.raises(ValueError, match=r"token_ids\[1\] is 8"):
        ops.token_logprobs(torch.zeros(2, 8), torch.tensor([0, 8]), 1)
    with pytest.raises(ValueError, match="top_k is 9"):
        ops.token_logprobs(torch.zeros(2, 8), torch.tensor([0, 1]), 9)
    empty, none = torch.empty(0), torch.empty(0, dtype=torch.int64)
    one = torch.ones(1)
    for rows, ids, offsets, message in (
        ([5], [0], [0, 1], r"rows\[0\] is 5"),
        ([0], [8], [0, 1], r"token_ids\[0\] is 8"),
        ([0], [1], [0, 2], "offsets must ascend"),
    ):
        batch = PenaltyBatch(
            torch.tensor(rows),
            one,
            one,
            one,
            torch.tensor(offsets),
            torch.tensor(ids),
            torch.ones(len(ids), dtype=torch.int32),
            torch.tensor([0, 0]),
            none,
            empty,
        )
        with pytest.raises(ValueError, match=message):
            ops.apply_penalties(torch.zeros(2, 8), batch)


@pytest.mark.parametrize("path", ["ref/torch", *paths("finite_rows")])
def test_rows_that_are_not_finite_are_found(path: str) -> None:
    logits = torch.randn(6, 77)[:, 2:75]
    logits[1, 0], logits[2, 72], logits[4, 35] = float("nan"), float("inf"), float("-inf")
    logits[3], logits[5, 3] = torch.finfo(torch.float32).max, 1e-45
    with registry.force("finite_rows", path):
        assert ops.finite_rows(logits).tolist() == [True, False, False, True, False, True]
        assert ops.finite_rows(logits[:0]).shape == (0,)

"""Our models against transformers' on random weights, float32: every way a step can be cut gives the same logits."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_cases import CASES, TOLERANCE, assert_close, reference_greedy, reference_logits, relative_error
from paged import Paged
from torch import nn

from tokenrelay.kernels import ops

CASE = {case.name: case for case in CASES}


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random ids above the special tokens."""
    source = random.Random(seed)
    return [source.randrange(3, 384) for _ in range(length)]


def test_prefill_in_one_step(pair: Any) -> None:
    tokens = prompt(53)
    paged = Paged(pair.model)
    row = paged.add(tokens)
    assert_close(paged.step({row: len(tokens)}, every=True)[row], reference_logits(pair.hf, tokens))


def test_chunked_prefill_then_decode(pair: Any) -> None:
    tokens = prompt(60, seed=1)
    expected = reference_logits(pair.hf, tokens)
    paged = Paged(pair.model, seed=1)
    row = paged.add(tokens)
    done = 0
    for length in (16, 17, 2, 14, *[1] * 11):  # at a block's border, across it, short, then decode across another
        found = paged.step({row: length}, every=True)[row]
        assert_close(found, expected[done : done + length], f"tokens {done} to {done + length}")
        done += length
    assert done == len(tokens)


def test_mixed_batches_with_prefix_hits(pair: Any) -> None:
    """Decode rows, fresh prompts, chunks, and prompts whose first blocks another sequence computed, in one step."""
    trunk = prompt(70, seed=2)
    texts = [trunk, prompt(29, seed=3), trunk[:32] + prompt(20, seed=4), trunk[:48] + prompt(15, seed=5)]
    expected = [reference_logits(pair.hf, text) for text in texts]
    paged = Paged(pair.model, seed=2)
    a, b = paged.add(texts[0]), paged.add(texts[1])

    def step(lengths: dict[int, int]) -> None:
        before = {row: paged.rows[row].done for row in lengths}
        for row, found in paged.step(lengths, every=True).items():
            first = before[row]
            assert_close(found, expected[row][first : first + lengths[row]], f"sequence {row} from {first}")

    step({a: 49})
    step({a: 1, b: 20})
    c = paged.add(texts[2], prefix_of=a, prefix_blocks=2)
    step({b: 5, a: 1, c: 11})
    d = paged.add(texts[3], prefix_of=a, prefix_blocks=3)
    step({d: 3, c: 1, b: 1, a: 1})
    step({d: 11, c: 7, b: 1, a: 2})
    step({d: 1, c: 1, b: 1, a: 1})


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["v3-direct-q-yarn", "v2-grouped-qlora-yarn", "qwen3-sharded", "qwen3-moe-mixed"])
def test_random_schedules(pair_of: Callable[..., Any], name: str, seed: int) -> None:
    """Six sequences, half of them on another's blocks, cut and mixed at random until all are done."""
    pair = pair_of(CASE[name])
    source = random.Random(seed)
    paged = Paged(pair.model, seed=seed)
    trunk = prompt(60, seed=seed)
    texts: list[list[int]] = []
    for i in range(6):
        shared = source.choice([0, 1, 2, 3]) if i and paged.rows[0].done >= 48 else 0
        texts.append(trunk[: shared * 16] + prompt(source.randrange(1, 40), seed=100 * seed + i) if i else trunk)
        paged.add(texts[i], prefix_of=0 if shared else None, prefix_blocks=shared)
        while True:
            left = {row: len(texts[row]) - paged.rows[row].done for row in range(i + 1)}
            running = [row for row, count in left.items() if count]
            if not running or (i < 5 and source.random() < 0.3 and paged.rows[0].done >= 48):
                break
            chosen = source.sample(running, source.randrange(1, len(running) + 1))
            lengths = {row: source.choice([1, source.randrange(1, left[row] + 1)]) for row in chosen}
            before = {row: paged.rows[row].done for row in chosen}
            for row, found in paged.step(lengths, every=True).items():
                expected = reference_logits(pair.hf, texts[row])[before[row] : before[row] + lengths[row]]
                assert_close(found, expected, f"sequence {row} from {before[row]}")
    assert all(paged.rows[row].done == len(texts[row]) for row in range(6))
    assert any(row.blocks[:1] == paged.rows[0].blocks[:1] for row in paged.rows[1:]), "no prefix was shared"


def test_logits_of_sampled_rows_only(pair: Any) -> None:
    tokens = prompt(40, seed=6)
    paged = Paged(pair.model, seed=3)
    row = paged.add(tokens)
    ids, batch, _ = paged.batch({row: 40})
    expected = reference_logits(pair.hf, tokens)
    rows = torch.tensor([0, 17, 39])
    assert_close(pair.model(ids, batch, paged.caches, rows), expected[rows])
    assert pair.model(ids, batch, paged.caches, torch.empty(0, dtype=torch.int64)).shape == (0, expected.shape[1])


def test_a_step_that_samples_nothing_still_writes_its_cache(pair: Any) -> None:
    tokens = prompt(24, seed=7)
    paged = Paged(pair.model, seed=4)
    row = paged.add(tokens)
    ids, batch, _ = paged.batch({row: 23})
    pair.model(ids, batch, paged.caches, torch.empty(0, dtype=torch.int64))
    paged.rows[row].done = 23
    assert_close(paged.step({row: 1})[row], reference_logits(pair.hf, tokens)[-1])


def test_greedy_text_of_64_tokens(pair: Any) -> None:
    start = prompt(20, seed=8)
    expected, gaps = reference_greedy(pair.hf, start, 64)
    paged = Paged(pair.model, seed=5)
    row = paged.add(start)
    tokens: list[int] = []
    logits = paged.step({row: len(start)})[row]
    for wanted, gap in zip(expected, gaps, strict=True):
        token = int(logits.argmax())
        if token != wanted:
            # Two logits closer than the tolerance may change places on another machine; the texts part there.
            assert gap <= 2 * TOLERANCE * float(logits.abs().max()), f"token {len(tokens)}: {token}, not {wanted}"
            break
        tokens.append(token)
        paged.rows[row].tokens.append(token)
        logits = paged.step({row: 1})[row]
    assert len(tokens) >= 32, "the texts parted at a tie too early to show anything; choose another seed"


@pytest.mark.parametrize("name", ["v2-grouped-qlora-yarn", "v3", "qwen2", "qwen3-moe-mixed"])
def test_bfloat16_stays_near_float32(pair_of: Callable[..., Any], name: str) -> None:
    from tokenrelay.runtime.weights.loader import load_model

    pair = pair_of(CASE[name])
    tokens = prompt(33, seed=9)
    paged = Paged(load_model(pair.folder, dtype=torch.bfloat16, block_tokens=16))
    row = paged.add(tokens)
    first = paged.step({row: 32}, every=True)[row]
    last = paged.step({row: 1}, every=True)[row]
    found = torch.cat([first, last])
    assert found.dtype == torch.float32
    expected = reference_logits(pair.hf, tokens)
    # Single tokens may take another expert; the bulk must not move.
    error = float((found - expected).norm() / expected.norm())
    assert error < 0.08, f"bfloat16 is {error:.3f} away"


def _halves_for_pairs(model: nn.Module) -> None:
    for layer in model.layers:  # type: ignore[union-attr]
        layer.attention.core.interleaved = not layer.attention.core.interleaved


def _scale(model: nn.Module) -> None:
    for layer in model.layers:  # type: ignore[union-attr]
        core = layer.attention.core
        (core if hasattr(core, "scale") else core.attend).scale *= 1.01


def _rope_shift(model: Any) -> None:
    model.cos_sin = model.cos_sin.roll(1, 0)


def _unscaled_frequencies(model: Any) -> None:
    model.cos_sin = model.cos_sin[torch.arange(len(model.cos_sin)) // 2]


def _no_shared_expert(model: Any) -> None:
    for layer in model.layers:
        if hasattr(layer.mlp, "shared"):
            layer.mlp.shared = None


def _no_correction_bias(model: Any) -> None:
    for layer in model.layers:
        if hasattr(layer.mlp, "router"):
            layer.mlp.router.bias = None


@pytest.mark.parametrize(
    ("name", "mutate"),
    [
        ("v3", _halves_for_pairs),
        ("v3", _scale),
        ("v3", _rope_shift),
        ("v3", _no_shared_expert),
        ("v3", _no_correction_bias),
        ("v2-greedy", _halves_for_pairs),
        ("qwen3-sharded", _rope_shift),
        ("llama3-scaled", _unscaled_frequencies),
        ("llama3-scaled", _scale),
    ],
)
def test_the_comparison_sees_a_wrong_model(
    pair_of: Callable[..., Any], name: str, mutate: Callable[[Any], None]
) -> None:
    """Each mutation is a mistake that one could make; parity above would not notice a model that is too tame."""
    from tokenrelay.runtime.weights.loader import load_model

    pair = pair_of(CASE[name])
    model = load_model(pair.folder, dtype=torch.float32, block_tokens=16)
    mutate(model)
    tokens = prompt(53)
    paged = Paged(model)
    row = paged.add(tokens)
    error = relative_error(paged.step({row: 53}, every=True)[row], reference_logits(pair.hf, tokens))
    assert error > 10 * TOLERANCE, f"a wrong model passes: {error:.2e}"


def test_positions_and_rows_are_not_swapped_between_sequences(pair_of: Callable[..., Any]) -> None:
    """A batch whose rows read each other's blocks must show: the poison in unwritten slots, or the wrong logits."""
    pair = pair_of(CASE["v3"])
    tokens = [prompt(20, seed=10), prompt(20, seed=11)]
    paged = Paged(pair.model)
    rows = [paged.add(text) for text in tokens]
    ids, batch, _ = paged.batch({rows[0]: 20, rows[1]: 20})
    swapped = ops.AttentionBatch(
        batch.block_table, batch.slots.flip(0), batch.starts, batch.lengths, batch.offsets, batch.positions,
        batch.cache_slots, batch.decodes, batch.context_max,
    )  # fmt: skip
    logits = pair.model(ids, swapped, paged.caches, torch.tensor([19]))
    assert relative_error(logits[0], reference_logits(pair.hf, tokens[0])[-1]) > 10 * TOLERANCE

"""Sampling in Triton gives the reference's token, bit for bit; penalties give its logits."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton_cases import DEVICE, FULL, pick

from tokenrelay.kernels.batch import PenaltyBatch, SamplingBatch
from tokenrelay.kernels.ref import sampling as ref
from tokenrelay.kernels.triton import sampling
from tokenrelay.kernels.triton import sampling_kernels as kernels


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks and blocks of a vocabulary that the interpreter can walk."""
    if not FULL:
        monkeypatch.setattr(sampling, "CHUNK", 256)
        monkeypatch.setattr(sampling, "BLOCK", 128)


def batch_of(rows: list[dict[str, float]]) -> SamplingBatch:
    """One dict of settings a row."""

    def column(name: str, default: float, dtype: torch.dtype) -> Tensor:
        return torch.tensor([row.get(name, default) for row in rows], dtype=dtype)

    return SamplingBatch(
        temperature=column("temperature", 1.0, torch.float32),
        top_p=column("top_p", 1.0, torch.float32),
        top_k=column("top_k", 0, torch.int32),
        min_p=column("min_p", 0.0, torch.float32),
        seed=column("seed", 7, torch.int64),
        choice=column("choice", 0, torch.int32),
        position=column("position", 0, torch.int64),
    )


def draw(logits: Tensor, batch: SamplingBatch) -> list[int]:
    fields = {f.name: getattr(batch, f.name).to(DEVICE) for f in dataclasses.fields(batch)}
    return sampling.sample(logits.to(DEVICE), SamplingBatch(**fields)).tolist()


SETTINGS: list[dict[str, float]] = [
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"temperature": 1e-6},
    {"temperature": 100.0},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 50, "temperature": 2.5},
    {"top_k": 100_000},
    {"top_p": 0.0},
    {"top_p": 0.1},
    {"top_p": 0.5, "temperature": 3.0},
    {"top_p": 0.9},
    {"top_p": 0.999, "temperature": 2.5},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.8, "temperature": 2.0},
    {"top_k": 300, "top_p": 0.95, "min_p": 0.01, "temperature": 3.0},
    {"top_k": 3, "top_p": 0.75},
]


@pytest.mark.parametrize("kind", ["plain", "ties", "holes"])
@pytest.mark.parametrize("vocab", pick([290], [1, 600, 129_280, 160_001]))
def test_tokens_equal_the_reference(vocab: int, kind: str) -> None:
    logits = torch.randn(len(SETTINGS), vocab) * 3
    if kind == "ties":
        logits = logits.round()
    if kind == "holes":
        logits[:, ::3] = -math.inf
        logits[1], logits[3] = float("nan"), -math.inf
        logits[2, vocab // 2] = math.inf
        logits[5:, :2] = torch.tensor([-0.0, 0.0])[:vocab]
    rows = [{**row, "seed": 1000 + i, "position": i, "choice": i % 3} for i, row in enumerate(SETTINGS)]
    batch = batch_of(rows)
    assert draw(logits, batch) == ref.sample(logits, batch).tolist()


def test_many_seeds_of_one_row() -> None:
    """The draw lands in every block, on its edges too."""
    logits = torch.zeros(1, 300).expand(12, -1).contiguous()
    rows = [{"seed": 77, "position": i, "top_k": 299 if i % 2 else 0} for i in range(12)]
    batch = batch_of(rows)
    assert draw(logits, batch) == ref.sample(logits, batch).tolist()


@kernels.jit
def _philox(seeds: tl.tensor, choices: tl.tensor, positions: tl.tensor, out: tl.tensor, COUNT: tl.constexpr) -> None:
    at = tl.arange(0, COUNT)
    random = kernels.philox(tl.load(seeds + at), tl.load(choices + at), tl.load(positions + at))
    tl.store(out + at, random.to(tl.int64, bitcast=True))


@kernels.jit
def _weights(logits: tl.tensor, inverse: tl.tensor, out: tl.tensor, COUNT: tl.constexpr) -> None:
    at = tl.arange(0, COUNT)
    zero = tl.zeros((), tl.float32)
    tl.store(out + at, kernels.weight_of(tl.load(logits + at), zero, tl.load(inverse)))


def test_philox_equals_the_reference() -> None:
    seeds = torch.tensor([0, 1, -1, 1 << 62, -(1 << 63), 5, 6, 7])
    choices = torch.tensor([0, 5, 127, 2**31 - 1, 1, 0, 0, 0], dtype=torch.int32)
    positions = torch.tensor([0, 9, 1 << 40, 7, 2**63 - 1, 1, 2, 3])
    out = torch.empty(8, dtype=torch.int64, device=DEVICE)
    _philox[(1,)](seeds.to(DEVICE), choices.to(DEVICE), positions.to(DEVICE), out, COUNT=8)
    assert [n % (1 << 64) for n in out.tolist()] == ref.philox(seeds, choices, positions)


@pytest.mark.parametrize("temperature", [0.01, 0.7, 3.0])
def test_weights_equal_the_reference_bit_for_bit(temperature: float) -> None:
    """A fused multiply-add, another order of terms or another rounding would show here."""
    count = pick(1 << 15, 1 << 17)
    logits = torch.cat((torch.linspace(-35, 0, count // 2), torch.linspace(-2, 0, count // 2))) * temperature
    t = torch.tensor([temperature])
    out = torch.empty(count, dtype=torch.int64, device=DEVICE)
    _weights[(1,)](logits.to(DEVICE), (1.0 / t.double()).to(DEVICE), out, COUNT=count, enable_fp_fusion=False)
    assert torch.equal(out.cpu(), ref.token_weights(logits, float(t)))


def test_nothing_to_choose_from() -> None:
    assert draw(torch.zeros(0, 9), batch_of([])) == []
    with pytest.raises(ValueError, match="empty vocabulary"):
        draw(torch.zeros(1, 0), batch_of([{}]))
    with pytest.raises(ValueError, match="temperature has shape"):
        draw(torch.zeros(2, 9), batch_of([{}]))


def test_penalties_equal_the_reference() -> None:
    vocab = pick(200, 129_280)
    logits = torch.randn(4, vocab) * 3
    ids = [torch.randperm(vocab)[:n] for n in (pick(90, 5000), 0, 3)]
    batch = PenaltyBatch(
        rows=torch.tensor([2, 0, 3]),
        presence=torch.tensor([0.5, 1.0, 0.0]),
        frequency=torch.tensor([0.3, 1.0, 0.7]),
        repetition=torch.tensor([1.3, 2.0, 1.0]),
        offsets=torch.tensor([0, *torch.tensor([len(i) for i in ids]).cumsum(0).tolist()]),
        token_ids=torch.cat(ids),
        output_counts=torch.randint(4, (sum(len(i) for i in ids),), dtype=torch.int32),
        bias_offsets=torch.tensor([0, 2, 3, 3]),
        bias_token_ids=torch.tensor([int(ids[0][0]), 5, 7]),
        bias=torch.tensor([-100.0, 2.5, 1.0]),
    )
    expected = logits.clone()
    ref.apply_penalties(expected, batch)
    fields = {f.name: getattr(batch, f.name).to(DEVICE) for f in dataclasses.fields(batch)}
    there = logits.to(DEVICE)
    sampling.apply_penalties(there, PenaltyBatch(**fields))
    assert torch.equal(there.cpu(), expected)

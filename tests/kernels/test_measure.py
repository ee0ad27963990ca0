"""What operations cannot avoid, counted by hand; and the command that holds their times against it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint
from typer.testing import CliRunner

from tokenrelay.cli.main import app
from tokenrelay.kernels import ops
from tokenrelay.kernels.batch import AttentionBatch
from tokenrelay.kernels.measure import measure
from tokenrelay.kernels.quantized import quantize
from tokenrelay.kernels.work import Ceiling, Work, work_of


def batch_of(rows: list[tuple[int, int]], decodes: int) -> AttentionBatch:
    """Rows of (start, length); one block of 64 tokens each."""
    starts, lengths = (torch.tensor(column, dtype=torch.int32) for column in zip(*rows, strict=True))
    offsets = torch.cat((torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).to(torch.int32)))
    positions = torch.cat([torch.arange(s, s + n) for s, n in rows])
    owner = torch.repeat_interleave(torch.arange(len(rows)), lengths.long())
    return AttentionBatch(
        block_table=torch.arange(len(rows), dtype=torch.int32)[:, None],
        slots=torch.arange(len(rows), dtype=torch.int32),
        starts=starts,
        lengths=lengths,
        offsets=offsets,
        positions=positions,
        cache_slots=owner * 64 + positions,
        decodes=decodes,
        context_max=int((starts + lengths).max()),
    )


def test_linear_counts_its_weights_once() -> None:
    x, weight = torch.randn(3, 128), torch.randn(10, 128)
    assert work_of("linear", (x, weight, None), x @ weight.T) == Work(4 * (3 * 128 + 1280 + 30), 2 * 3 * 1280)
    small = quantize(weight, bits=4, group=64)
    bytes_ = 4 * 3 * 128 + 10 * 64 + 4 * 20 + 4 * 30
    assert work_of("quantized_linear", (x, small, None), x @ weight.T) == Work(bytes_, 2 * 3 * 1280)


def test_attention_counts_what_each_row_sees() -> None:
    batch = batch_of([(9, 1), (4, 1), (2, 3)], 2)  # contexts of 10 and 5; pairs of the chunk: 3 + 4 + 5
    cache = torch.zeros(3, 2, 2, 64, 16)
    q = torch.zeros(2, 4, 16)
    kv = 2 * 2 * 16 * 4
    assert work_of("gqa_decode", (q, cache, batch, 1.0), q) == Work(15 * kv + 2 * 2 * 64 * 4, 4 * 15 * 4 * 16)
    q = torch.zeros(3, 4, 16)
    assert work_of("gqa_prefill", (q, cache, batch, 1.0), q) == Work(5 * kv + 2 * 3 * 64 * 4, 4 * 12 * 4 * 16)
    latent, rope = torch.zeros(2, 4, 32), torch.zeros(2, 4, 8)
    found = work_of("mla_decode", (latent, rope, torch.zeros(3, 64, 40), batch, 1.0), latent)
    assert found == Work(15 * 40 * 4 + 4 * (2 * 256 + 64), 2 * 15 * 4 * 72)
    nope, rope, w = torch.zeros(3, 4, 16), torch.zeros(3, 4, 8), torch.zeros(4, 16, 32)
    found = work_of("mla_prefill", (nope, rope, torch.zeros(3, 64, 40), batch, w, w, 1.0), nope)
    assert found.flops == 2 * 4 * min(12 * 72 + 3 * 32 * 32, 12 * 40 + 5 * 32 * 32)


def test_experts_that_nobody_chose_are_not_read() -> None:
    x = torch.randn(2, 16)
    gate_up, down = torch.randn(8, 24, 16), torch.randn(8, 16, 12)
    experts = torch.tensor([[1, 2], [2, -1]], dtype=torch.int32)
    found = work_of("moe", (x, experts, torch.ones(2, 2), gate_up, down), x)
    assert found == Work(2 * 3 * 16 * 12 * 4 + 2 * 32 * 4, 6 * 3 * 16 * 12)


def test_the_floor_is_the_longer_of_both() -> None:
    ceiling = Ceiling(100, 1000)
    assert Work(10, 10).floor_s(ceiling) == 0.1 and Work(10, 500).floor_s(ceiling) == 0.5


def test_calls_are_summed_by_shape_and_tokens() -> None:
    def run() -> None:
        for tokens in (3, 3, 5):
            ops.silu_mul(torch.ones(tokens, 16))

    five, three = sorted(measure(run, 2), key=lambda line: line.calls)
    assert (three.op, three.tokens, three.calls, three.work) == ("silu_mul", 3, 2, Work(2 * 3 * 24 * 4))
    assert (five.tokens, five.calls, five.work) == (5, 1, Work(5 * 24 * 4))
    assert min(three.seconds, five.seconds) > 0 and three.path.startswith("cpu/")


@pytest.mark.parametrize("weights", ["auto", "int4-32"])
def test_the_command_prints_every_operation(tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenrelay.kernels.measure.READ_BYTES", 1 << 20)
    monkeypatch.setattr("tokenrelay.kernels.measure.PRODUCT", 128)
    folder = make_checkpoint(tmp_path / "m", "deepseek_v2")
    command = ["kernels", "bench", str(folder), "--rounds", "1", "--weight-dtype", weights]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    for op in ("mla_decode", "mla_prefill", "moe_route", "add_rms_norm", "rotary"):
        assert op in result.output
    assert re.search(r"All: [\d.]+ ms, \d+% of the ceiling, which is [\d.]+ GB/s", result.output)

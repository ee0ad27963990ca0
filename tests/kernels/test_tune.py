"""Kernels chosen by measurement: what is found, kept, read again, and what overrides it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint
from torch import Tensor
from typer.testing import CliRunner

from tokenrelay.base.errors import ConfigError
from tokenrelay.cli.main import app
from tokenrelay.kernels import ops, registry, tune
from tokenrelay.kernels.tune import Finding

KEY = ("silu_mul", "cpu", "float32", (("width", 16),))


@pytest.fixture
def slow() -> Iterator[str]:
    """A kernel of the highest priority that takes its time."""

    @registry.register(op="silu_mul", path="test/slow", priority=99)
    def silu_mul(gate_up: Tensor) -> Tensor:
        time.sleep(0.005)
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    yield "test/slow"
    registry.unregister("silu_mul", "test/slow")


@pytest.fixture(autouse=True)
def nothing_tuned() -> Iterator[None]:
    yield
    registry.tuned({})


def run() -> Any:
    return ops.silu_mul(torch.ones(3, 16))


def test_what_is_faster_is_found_and_used(slow: str, tmp_path: Path) -> None:
    findings = list(tune.tune(run, 2))
    assert [finding.key for finding in findings] == [KEY]
    (found,) = findings
    assert found.before == slow and found.before_us > 4000
    assert found.gained and found.best.startswith("cpu/") and found.best_us < 4000 and found.tried >= 2
    file = tmp_path / "deep" / "kernels.json"
    assert tune.save(file, findings) == 1
    before = registry.generation()
    registry.tuned(tune.load(file))
    assert registry.generation() != before and registry.tuned_digest()
    chosen = registry.explain("silu_mul", dtype="float32", width=16)
    assert chosen.chosen is not None and chosen.chosen.path == found.best
    reasons = {verdict.kernel.path: verdict.reason for verdict in chosen.verdicts}
    assert reasons[found.best] == "chosen: tuned" and reasons[slow] == f"{found.best} was faster when it was tuned"
    assert registry.select("silu_mul", dtype="float32", width=32).path == slow  # another shape
    with registry.force("silu_mul", slow):
        assert registry.select("silu_mul", dtype="float32", width=16).path == slow
    registry.tuned({KEY: "cpu/unknown"})
    assert registry.select("silu_mul", dtype="float32", width=16).path == slow  # what is not there cannot run


def test_a_small_gain_is_noise() -> None:
    assert not Finding(KEY, "a", 100, "b", 98, 2).gained
    assert not Finding(KEY, "a", 100, "a", 50, 2).gained
    assert Finding(KEY, "a", 100, "b", 90, 2).gained


def test_timing_sees_each_call_and_ends() -> None:
    with registry.timing() as times:
        run()
        run()
    assert list(times) == [KEY] and len(times[KEY]) == 2 and all(seconds > 0 for seconds in times[KEY])
    run()
    assert len(times[KEY]) == 2


def test_files_add_up_and_what_no_longer_gains_goes(tmp_path: Path) -> None:
    file, other = tmp_path / "kernels.json", ("silu_mul", "cpu", "float32", (("width", 64),))
    assert tune.save(file, [Finding(KEY, "cpu/avx2", 100, "cpu/baseline", 50, 2)]) == 1
    assert tune.save(file, [Finding(other, "cpu/avx2", 100, "cpu/baseline", 50, 2)]) == 2
    assert tune.load(file) == {KEY: "cpu/baseline", other: "cpu/baseline"}
    assert tune.save(file, [Finding(KEY, "cpu/avx2", 100, "cpu/baseline", 99, 2)]) == 1
    assert tune.load(file) == {other: "cpu/baseline"}
    data = json.loads(file.read_text())
    file.write_text(json.dumps(data | {"machine": "another"}))
    assert tune.load(file) == {}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1, "machine": 5, "choices": 3}', "\x00"])
def test_files_that_make_no_sense_are_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "kernels.json"
    file.write_text(text.replace('"machine": 5', f'"machine": "{tune.machine()}"'))
    with pytest.raises(ConfigError, match=r"kernels\.json does not hold tuned kernels"):
        tune.load(file)


def test_the_command_times_a_model_and_writes_the_file(tmp_path: Path) -> None:
    folder, file = make_checkpoint(tmp_path / "m", "deepseek_v2"), tmp_path / "kernels.json"
    result = CliRunner().invoke(app, ["kernels", "tune", str(folder), "--file", str(file), "--rounds", "1"])
    assert result.exit_code == 0, result.output
    assert "mla_prefill" in result.output and "moe_route" in result.output and "shapes gain" in result.output
    assert all(tune.load(file).values()) and json.loads(file.read_text())["machine"] == tune.machine()

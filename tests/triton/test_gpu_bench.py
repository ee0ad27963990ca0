"""bench/gpu.py where there is no GPU: it says so; its cases are right, and so are their floors."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tokenrelay.kernels import registry
from tokenrelay.runtime.executor.graphs import Eager

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "gpu.py"
ENGINE_SCRIPT = SCRIPT.with_name("gpu_engine.py")
CPU = torch.device("cpu")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, with small sizes."""
    spec = importlib.util.spec_from_file_location("bench_gpu", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    for name, value in (("RANK", 64), ("ROPE", 16), ("NOPE", 16), ("VALUE", 16), ("PAGE", 16), ("CALLS_MAX", 2)):
        monkeypatch.setattr(module, name, value)
    return module


@contextlib.contextmanager
def on_triton(**paths: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for op, path in paths.items():
            stack.enter_context(registry.force(op, path))
        yield


@pytest.mark.parametrize("script", [SCRIPT, ENGINE_SCRIPT], ids=["kernels", "engine"])
def test_without_a_gpu_it_says_so(tmp_path: Path, script: Path) -> None:
    target = tmp_path / "result.json"
    command = [sys.executable, str(script), "--quick", "--json", str(target)]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}  # of those there may be, it sees none
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert "there is no GPU" in done.stderr
    result = json.loads(target.read_text(encoding="utf-8"))
    assert result["gpu"] is None
    assert result["results"] == []


def test_the_cases_compute_what_they_say(bench: ModuleType) -> None:
    """Each case's own check, on the kernels it times, in the interpreter."""
    with on_triton(mla_decode="triton/balanced", mla_prefill="triton/balanced", moe="triton/grouped"):
        assert bench.mla_decode_case(2, 1, 3, 40, CPU).check() < bench.ERROR_MAX
        assert bench.mla_decode_case(2, 3, 3, 40, CPU).check() < bench.ERROR_MAX
        assert bench.mla_prefill_case(30, [5, 3], 2, CPU).check() < bench.ERROR_MAX
        assert bench.moe_case(3, 4, 128, 32, CPU, small=False).check() < bench.ERROR_MAX
    with on_triton(mla_decode="triton/balanced-fp8", scaled_moe="triton/grouped"):
        assert bench.mla_decode_case(1, 1, 3, 40, CPU, small=True).check() < bench.ERROR_MAX
        assert bench.moe_case(3, 4, 128, 32, CPU, small=True).check() < bench.ERROR_MAX


def test_the_layers_cases_compute_what_they_say(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float8 products and the fused writes, each beside its peer, which does the same work."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    layers = importlib.import_module("gpu_layers")
    monkeypatch.setattr(layers, "copies_of", lambda _: 2)
    for name, value in (("HEADS", 4), ("KV_HEADS", 2), ("HEAD_DIM", 32), ("CONTEXT", 50), ("RANK", 64), ("ROPE", 16)):
        monkeypatch.setattr(layers, name, value)
    with on_triton(scaled_linear="triton/tiles", gqa_rotary_write="triton/rows", mla_rotary_write="triton/rows"):
        linear = layers.linear_case(3, 256, 160, CPU)
        made = [linear, layers.gqa_write_case(5, CPU), layers.mla_write_case(5, CPU, small=False)]
        assert [case.check() < bench.ERROR_MAX for case in made] == [True] * 3
        with on_triton(mla_rotary_write="triton/fp8"):
            assert layers.mla_write_case(5, CPU, small=True).check() < bench.ERROR_MAX
        assert len(linear.calls) == len(linear.peers["bf16"]) == 2
        truth = linear.peers["bf16"][1]()
        assert layers.error_of(linear.calls[1](), truth.double()) < 0.06
        turned = made[1].calls[0]()
        assert torch.equal(made[1].peers["apart"][0](), turned)


def test_a_wrong_result_is_not_timed(bench: ModuleType) -> None:
    case = bench.Case("mla_decode", "x", 1000, 1000, [lambda: pytest.fail("timed")], lambda: float("nan"))
    assert "wrong" in bench.measure(case, {"read_gb_s": 1.0, "bf16_tflop_s": 1.0})


def test_floors(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek-V3's sizes: 128 rows of heads are where arithmetic takes over from memory."""
    monkeypatch.setattr(bench, "RANK", 512)
    monkeypatch.setattr(bench, "ROPE", 64)
    limits = {"read_gb_s": 4300.0, "bf16_tflop_s": 790.0}

    def floor(heads: int, queries: int) -> tuple[float, str]:
        size = bench.mla_bytes(64, queries, heads, 32_768, small=False)
        flops = bench.mla_flops(64, queries, heads, 32_768)
        return bench.floor_us(bench.Case("mla_decode", "", size, flops, [], lambda: 0.0), limits)

    assert floor(16, 1)[1] == floor(64, 1)[1] == "memory"
    assert floor(128, 1)[1] == "arithmetic"
    assert floor(16, 1)[0] == pytest.approx(64 * 32_768 * 1152 / 4300e3, rel=0.01)
    assert floor(64, 2)[0] == pytest.approx(floor(128, 1)[0], rel=0.01)


def test_absent_peers_are_named(bench: ModuleType) -> None:
    case = bench.mla_decode_case(1, 1, 2, 20, CPU)
    for name, module in (("flashinfer", "flashinfer"), ("flashmla", "flash_mla")):
        if importlib.util.find_spec(module) is None:
            assert "ModuleNotFoundError" in case.refused[name]


def test_the_engine_case_decodes_a_random_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same code, with a tiny model on a CPU; the floor counts an expert no more often than it is read."""
    monkeypatch.syspath_prepend(str(ENGINE_SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("bench_gpu_engine", ENGINE_SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tiny = {"vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tiny |= {"num_key_value_heads": 2, "intermediate_size": 64, "moe_intermediate_size": 32, "n_routed_experts": 4}
    tiny |= {"num_experts_per_tok": 2, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16}
    config = {**module.LITE, **tiny, "v_head_dim": 16}
    model = module.random_model(config, CPU, context_tokens=512, dtype=torch.float32)
    found = module.decode(model, 3, 20, 8, Eager())
    assert found["tokens_per_s"] == pytest.approx(3 * found["tokens_per_s_user"])
    weights = sum(p.numel() * 4 for name, p in model.named_parameters() if not name.startswith("embed."))
    experts = sum(p.numel() * 4 for name, p in model.named_parameters() if ".experts." in name)
    assert experts > 0
    assert module.step_bytes(model, 1, 0) == pytest.approx(weights - experts / 2)
    assert module.step_bytes(model, 64, 0) == pytest.approx(weights)
    assert module.step_bytes(model, 2, 64) - module.step_bytes(model, 2, 0) == 2 * 64 * 2 * (32 + 16) * 4

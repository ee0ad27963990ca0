"""KV in float8: near the model in float64, exact on what the cache holds, and never taken for another dtype's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint, make_model
from harness import BLOCK_TOKENS, Harness, plain_greedy, plain_logits
from predictions import make_prediction_checkpoint
from torch import Tensor

from tokenrelay.base.errors import ConfigError, HandshakeRefused
from tokenrelay.kernels import ops, registry
from tokenrelay.kernels.layout import GqaFp8Layout, GqaLayout, MlaFp8Layout, MlaLayout
from tokenrelay.kernels.ref import fp8
from tokenrelay.runtime.build import EngineSizes, build_engine
from tokenrelay.runtime.executor.memory import plan_pool
from tokenrelay.runtime.weights.loader import load_model
from tokenrelay.services.decode.config import WorkerConfig
from tokenrelay.transfer.memory import Layout

PROMPT = [(7 * i * i + 3) % 300 + 3 for i in range(5 * BLOCK_TOKENS + 5)]
ERROR_MAX = 0.08  # of the logits' norm: latents keep three bits of mantissa, half a step of which is 1/16


@pytest.fixture(scope="module", params=["deepseek_v3", "qwen3"])
def family(request: pytest.FixtureRequest) -> str:
    """Latents, and keys and values of heads."""
    return str(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, family: str) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("fp8") / family, family)


def load(folder: Path, **options: Any) -> Any:
    return load_model(folder, **{"dtype": torch.float32, "block_tokens": BLOCK_TOKENS, "kv_dtype": "fp8", **options})


@pytest.fixture(scope="module")
def small(folder: Path) -> Any:
    return load(folder)


def error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def test_logits_are_near_the_model_in_float64(folder: Path, family: str, small: Any) -> None:
    """Transformers' model in float64 is the truth: the cache's rounding is seen, and it is small."""
    oracle = make_model(family).double()
    if family == "deepseek_v3":
        oracle.set_experts_implementation("eager")  # the others multiply no doubles
    with torch.inference_mode():
        truth = oracle(torch.tensor([PROMPT])).logits[0, -1]
    assert error(plain_logits(load(folder, kv_dtype="auto"), PROMPT), truth) < 1e-4
    assert 1e-3 < error(plain_logits(small, PROMPT), truth) < ERROR_MAX


@contextmanager
def rounded_on_the_way() -> Iterator[None]:
    """A full-precision cache gets what a float8 one would give back."""
    latents, heads = ops.mla_rotary_write, ops.gqa_rotary_write

    def write(q: Tensor, latent: Tensor, k: Tensor, at: Tensor, turns: Tensor, pairs: bool, *where: Tensor) -> Tensor:
        turned, keys = ops.rotary(q, k.unsqueeze(1), at, turns, pairs)
        entries = fp8.decode(fp8.encode(latent, keys.squeeze(1)), latent.shape[1])
        ops.mla_cache_write(*entries.split_with_sizes((latent.shape[1], k.shape[1]), dim=1), *where)
        return turned

    def write_heads(q: Tensor, k: Tensor, v: Tensor, at: Tensor, turns: Tensor, *where: Tensor) -> Tensor:
        turned, keys = ops.rotary(q, k, at, turns, False)
        ops.gqa_cache_write(*(fp8.decode_heads(fp8.encode_heads(x)) for x in (keys, v)), *where)
        return turned

    ops.mla_rotary_write, ops.gqa_rotary_write = write, write_heads
    try:
        yield
    finally:
        ops.mla_rotary_write, ops.gqa_rotary_write = latents, heads


def test_nothing_but_the_cache_is_rounded(folder: Path, small: Any) -> None:
    with rounded_on_the_way():
        expected = plain_logits(load(folder, kv_dtype="auto"), PROMPT).double()
    assert error(plain_logits(small, PROMPT), expected) < 1e-5


def test_an_engine_gives_the_tokens_of_a_plain_run(small: Any) -> None:
    """Chunks, a cached prefix, a copied tail, and blocks that went to host memory and came back."""
    prompts = [PROMPT, [*PROMPT[: 3 * BLOCK_TOKENS], 9, 8, 7], PROMPT]
    expected = [plain_greedy(small, prompt, 6) for prompt in prompts]
    with Harness(small) as harness:
        assert [harness.run(prompt, tokens_max=6)[0] for prompt in prompts] == expected
        cached = [t.cached_tokens for t in harness.transcripts.values()]
        assert cached[0] == 0 and cached[1] == 3 * BLOCK_TOKENS and cached[2] == len(PROMPT) - 1
        harness.assert_quiet()
    block_bytes = small.config.layers * small.config.kv_layout.bytes_per_block(small.config.kv_dtype)
    sizes = {"blocks": 14, "slots": 2, "context_tokens": 7 * BLOCK_TOKENS, "host_memory_bytes": 64 * block_bytes}
    others = [[(start + i * i) % 300 + 3 for i in range(len(PROMPT))] for start in (3, 50, 90)]
    with Harness(small, **sizes) as harness:
        for prompt in (PROMPT, *others, PROMPT):
            found = harness.run(prompt, tokens_max=6)[0]
        assert found == expected[0]
        assert harness.engine.stats.host.loads > 0, "the pool had evicted it"
        harness.assert_quiet()


def test_a_prediction_layer_keeps_its_kv_so_too(tmp_path: Path) -> None:
    model = load(make_prediction_checkpoint(tmp_path / "model"), prediction="on")
    expected = plain_greedy(model, PROMPT, 8)
    with Harness(model, draft_tokens=2) as harness:
        assert harness.run(PROMPT, tokens_max=8) == [expected]
        assert harness.engine._executor._caches[-1].dtype is torch.float8_e4m3fn


def test_a_token_takes_a_byte_a_latent_its_factors_and_the_rotated_part() -> None:
    wide, small = MlaLayout(512, 64, 64), MlaFp8Layout(512, 64, 64)
    assert (wide.bytes_per_block(torch.bfloat16), small.bytes_per_block(torch.float8_e4m3fn)) == (64 * 1152, 64 * 656)
    sizes: dict[str, Any] = {"slots": 64, "context_tokens": 4096, "context_asked": True, "kv_memory_bytes": 1 << 30}
    heads = GqaLayout(8, 128, 64).bytes_per_block(torch.bfloat16), GqaFp8Layout(8, 128, 64).bytes_per_block(torch.int8)
    assert heads == (64 * 4096, 64 * 2112)
    before = plan_pool(wide, 61, torch.bfloat16, **sizes).blocks
    assert plan_pool(small, 61, torch.float8_e4m3fn, **sizes).blocks == pytest.approx(before * 1152 / 656, abs=2)


def test_its_pool_is_allocated_and_counted_in_bytes(family: str, small: Any) -> None:
    built = build_engine(small, EngineSizes(slots=2, blocks=8), on_step=lambda *_: None)
    caches = built.engine._executor._caches
    built.engine.close()
    token = 32 + 4 + 2 * 8 if family == "deepseek_v3" else 2 * 2 * (16 + 4)
    assert {c.dtype for c in caches} == {torch.float8_e4m3fn}
    assert built.pool.bytes == sum(c.nbytes for c in caches) == 2 * 8 * BLOCK_TOKENS * token


def test_its_blocks_are_another_models(folder: Path, small: Any) -> None:
    """Shared by hash they would be misread: the identity differs, and peers name both layouts."""
    wide = load(folder, kv_dtype="auto").config
    assert wide.identity != small.config.identity == load(folder).config.identity
    ours, theirs = (
        Layout(
            model_identity=config.identity,
            dtype="float32",
            block_tokens=BLOCK_TOKENS,
            layout=config.kv_words,
            block_bytes=(config.kv_layout.bytes_per_block(config.kv_dtype),),
        )
        for config in (small.config, wide)
    )
    with pytest.raises(HandshakeRefused, match=r"layout: a has '\w*Fp8Layout.*, b has '\w+Layout.*bytes of a block"):
        ours.check("a", theirs, "b")


def test_what_has_no_float8_layout_or_kernel_is_refused(family: str, small: Any, tmp_path: Path) -> None:
    qwen = make_checkpoint(tmp_path / "qwen", "qwen3", head_dim=18)
    with pytest.raises(ConfigError, match=r"worker\.kv_dtype fp8: head_dim is 18"):
        load(qwen)
    odd = make_checkpoint(tmp_path / "odd", "deepseek_v3", kv_lora_rank=40)
    with pytest.raises(ConfigError, match=r"worker\.kv_dtype fp8: rank is 40"):
        load(odd)
    with pytest.raises(ConfigError, match=r"worker\.kv_dtype fp8 is for one rank; this worker has 2"):
        WorkerConfig(tp=2, kv_dtype="fp8").check()
    registry.deterministic()
    try:
        op = "mla_decode" if family == "deepseek_v3" else "gqa_decode"
        with registry.force(op, "ref/torch"), pytest.raises(ConfigError) as refused:
            build_engine(small, EngineSizes(slots=2, blocks=8), on_step=lambda *_: None)
    finally:
        registry.deterministic(False)
    assert "no kernel can run this here" in str(refused.value)
    assert "deterministic: required rows that do not depend on others" in str(refused.value)
    assert "dtype: required float8_e4m3fn, supported bfloat16, float32" in str(refused.value)

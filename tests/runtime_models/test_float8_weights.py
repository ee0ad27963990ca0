"""Matrices that stay in float8: the model that dequantizing would give, in half the memory, multiplied as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint
from paged import Paged
from predictions import make_prediction_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokenrelay.base.errors import ConfigError, KernelUnavailable
from tokenrelay.kernels import registry
from tokenrelay.kernels.scaled import BlockScaledWeight
from tokenrelay.runtime.layers.linear import Linear
from tokenrelay.runtime.layers.moe import Experts
from tokenrelay.runtime.weights.loader import load_model
from tokenrelay.runtime.weights.quantize import weight_bytes
from tokenrelay.services.decode.config import WorkerConfig

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "n_routed_experts": 4,
    "q_lora_rank": 128,
    "n_group": 2,
    "topk_group": 2,
    "num_experts_per_tok": 2,
}
TOKENS = [int(t) for t in torch.randint(3, 380, (21,), generator=torch.Generator().manual_seed(7))]


def in_blocks(folder: Path) -> Path:
    """As DeepSeek publishes its weights: projections in E4M3, a factor for each 128 x 128 beside them."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [name for name in tensors if "proj" in name and name.endswith("weight") and "eh_proj" not in name]:
            small = BlockScaledWeight.of(tensors[name])
            tensors[name], tensors[name + "_scale_inv"] = small.data, small.factors
        save_file(tensors, file, metadata={"format": "pt"})
    config = folder / "config.json"
    blocks = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    config.write_text(json.dumps({**json.loads(config.read_text()), **blocks}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return in_blocks(make_checkpoint(tmp_path_factory.mktemp("fp8") / "model", "deepseek_v3", **SIZES))


def load(folder: Path, **options: Any) -> Any:
    return load_model(folder, **{"dtype": torch.float32, "block_tokens": 16, "keep_fp8": True, **options})


def logits_of(model: Any) -> Tensor:
    """A prompt, and two tokens behind it."""
    paged = Paged(model)
    sequence = paged.add(TOKENS)
    found = [paged.step({sequence: count})[sequence] for count in (len(TOKENS) - 2, 1, 1)]
    return torch.stack([torch.as_tensor(one) for one in found]).double()


def error(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


def test_the_model_is_that_of_dequantized_weights(folder: Path) -> None:
    kept, wide = load(folder), load(folder, keep_fp8=False)
    for module in kept.modules():
        if isinstance(module, Experts):
            assert module.scaled is not None and not list(module.parameters())
        if isinstance(module, Linear):
            assert module.scaled is not None and "weight" not in dict(module.named_parameters()), module.outputs
    assert error(logits_of(kept), logits_of(wide)) < 1e-5
    assert kept.config.identity != wide.config.identity
    matrices = sum(
        module.width * sum(module.outputs.values()) for module in wide.modules() if isinstance(module, Linear)
    )
    matrices += sum(
        part.numel() for module in wide.modules() if isinstance(module, Experts) for part in module.parameters()
    )
    saved = weight_bytes(wide) - weight_bytes(kept)
    assert 2.95 * matrices < saved < 3 * matrices  # one byte of four, and the factors


def test_triton_multiplies_them_as_they_are(folder: Path) -> None:
    """Activations are rounded too, three bits of mantissa each time: near the model, and not the model."""
    model = load(folder, dtype=torch.bfloat16)
    truth = logits_of(load(folder, keep_fp8=False))
    with registry.force("scaled_linear", "triton/tiles"), registry.force("scaled_moe", "triton/grouped"):
        found = logits_of(model)
    assert error(logits_of(model), truth) < 0.03 < 0.04 < error(found, truth) < 0.2


def test_what_blocks_would_be_cut_by_is_dequantized(tmp_path: Path) -> None:
    """Experts of 72: gate and up meet inside a block. Queries of rank 72: what stands behind them does too."""
    odd = in_blocks(
        make_checkpoint(tmp_path / "odd", "deepseek_v3", **{**SIZES, "moe_intermediate_size": 72, "q_lora_rank": 72})
    )
    kept, wide = load(odd), load(odd, keep_fp8=False)
    attention = kept.layers[0].attention
    assert attention.down.scaled is None and attention.q_up.scaled is not None
    assert kept.layers[1].mlp.experts.scaled is None and kept.layers[1].mlp.shared.gate_up.scaled is None
    assert error(logits_of(kept), logits_of(wide)) < 1e-5


def test_a_prediction_layers_matrices_stay_too(tmp_path: Path) -> None:
    model = load(in_blocks(make_prediction_checkpoint(tmp_path / "model", **SIZES)), prediction="on")
    assert model.prediction.block.mlp.experts.scaled is not None
    assert model.prediction.mix.scaled is None and model.prediction.mix.weight.dtype is torch.float32


def test_what_cannot_stay_is_refused(folder: Path, tmp_path: Path) -> None:
    plain = make_checkpoint(tmp_path / "plain", "deepseek_v3")
    with pytest.raises(
        ConfigError, match=r"weight_dtype fp8 takes float8 blocks of 128 x 128; this checkpoint has none"
    ):
        load(plain)
    registry.deterministic()
    try:
        with registry.force("scaled_linear", "ref/torch"), pytest.raises(KernelUnavailable) as refused:
            load(folder)
    finally:
        registry.deterministic(False)
    assert "deterministic: required rows that do not depend on others" in str(refused.value)
    with pytest.raises(ConfigError, match=r"worker\.weight_dtype fp8 is for one rank; this worker has 2"):
        WorkerConfig(tp=2, weight_dtype="fp8").check()

"""Models whose matrices are packed: what they compute is the same but for last bits, whatever is beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint
from paged import Paged

from tokenrelay.kernels.packed import packs
from tokenrelay.runtime.models.decoder import Model
from tokenrelay.runtime.weights.loader import load_model
from tokenrelay.runtime.weights.pack import pack_model
from tokenrelay.runtime.weights.quantize import quantize_model, weight_bytes

PROMPT = [(7 * i * i + 3) % 300 for i in range(90)]
WIDTHS = {"qwen3_moe": {"moe_intermediate_size": 32}, "deepseek_v3": {"moe_intermediate_size": 32}}


def packed_names(model: Model) -> set[str]:
    return {name for name, module in model.named_modules() if getattr(module, "packed", None) is not None}


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "llama", "deepseek_v3"])
@pytest.mark.parametrize("form", ["auto", "int8", "int4"])
def test_packed_models_compute_what_they_did(tmp_path: Path, family: str, form: str) -> None:
    folder = make_checkpoint(tmp_path / family, family, **WIDTHS.get(family, {}))
    model = load_model(folder, dtype=torch.bfloat16, block_tokens=16)
    if form != "auto":
        quantize_model(model, form)
    plain = Paged(model)
    before, logits = weight_bytes(model), plain.step({plain.add(PROMPT): len(PROMPT)}, every=True)[0]
    pack_model(model)
    pack_model(model)  # once is enough
    here = packs(16 if form == "auto" else 8)
    assert here == ("layers.0.attention.out" in packed_names(model))
    assert here == ("head" in packed_names(model))
    if "moe" in family or "deepseek" in family:
        assert here == ("layers.1.mlp.experts" in packed_names(model))
    assert weight_bytes(model) <= before * 1.5  # rows and columns of tiny matrices are filled up
    paged = Paged(model)
    found = paged.step({paged.add(PROMPT): len(PROMPT)}, every=True)[0]
    off = float(((found - logits).norm(dim=-1) / logits.norm(dim=-1)).median())
    assert off < 0.02

"""Write a checkpoint of train.py as the published kind of folder: what DeepSeek names its tensors, in bfloat16.

    python -m tokenrelay.assets.training.export [--checkpoint FILE] [--out DIR]

The multi-token-prediction layer stands at `model.layers.{num_hidden_layers}`, with its own copy of embedding and head,
as in DeepSeek-V3's checkpoints; transformers ignores it.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tokenrelay.assets.training import template, tokenizer
from tokenrelay.assets.training.model import Model, Shape
from tokenrelay.assets.training.train import CHECKPOINT

FOLDER = tokenizer.FOLDER
SIZE_BYTES_MAX = 20_000_000


def config(shape: Shape) -> dict[str, Any]:
    """config.json."""
    special = tokenizer.VOCABULARY - len(tokenizer.SPECIAL) - len(tokenizer.TAGS)
    fixed = {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "moe_layer_freq": 1,
        "hidden_act": "silu",
        "rope_scaling": None,
        "rope_interleave": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": special,
        "eos_token_id": special + 2,
        "pad_token_id": special,
        "torch_dtype": "bfloat16",
    }
    return {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"} | asdict(shape) | fixed


def tensors(state: dict[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """A `Model`'s state under the published names, in bfloat16 (the selection bias in float32)."""
    extra = f"model.layers.{shape.num_hidden_layers}"
    outer = {
        "embed.weight": ["model.embed_tokens.weight", f"{extra}.embed_tokens.weight"],
        "head.weight": ["lm_head.weight", f"{extra}.shared_head.head.weight"],
        "norm.weight": ["model.norm.weight"],
        "mtp.norm.weight": [f"{extra}.shared_head.norm.weight"],
    }
    published: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in outer:
            names = outer[name]
        elif name.startswith("mtp.layer."):
            names = [f"{extra}.{name.removeprefix('mtp.layer.')}"]
        elif name.startswith("mtp."):
            names = [f"{extra}.{name.removeprefix('mtp.')}"]
        else:
            names = [f"model.{name}"]
        for target in names:
            published |= _expert_tensors(target, value, shape)
    return {
        name: (value if name.endswith("e_score_correction_bias") else value.bfloat16()).contiguous().clone()
        for name, value in published.items()
    }


def _expert_tensors(name: str, value: Tensor, shape: Shape) -> dict[str, Tensor]:
    """One stacked expert tensor as one tensor an expert; any other tensor as it is."""
    prefix, _, last = name.rpartition(".")
    if not prefix.endswith(".mlp") or last not in ("gate", "gate_up", "down", "bias"):
        return {name: value}
    if last == "gate":
        return {f"{prefix}.gate.weight": value}
    if last == "bias":
        return {f"{prefix}.gate.e_score_correction_bias": value.float()}
    found = {}
    for index, expert in enumerate(value):
        if last == "down":
            found[f"{prefix}.experts.{index}.down_proj.weight"] = expert
        else:
            gate, up = expert.split(shape.moe_intermediate_size)
            found[f"{prefix}.experts.{index}.gate_proj.weight"] = gate
            found[f"{prefix}.experts.{index}.up_proj.weight"] = up
    return found


def load(folder: Path = FOLDER) -> Model:
    """The training twin in float32 from an exported folder: the inverse of `tensors`."""
    from safetensors.torch import load_file

    stored = json.loads((folder / "config.json").read_text())
    shape = Shape(**{field: stored[field] for field in Shape.__dataclass_fields__})
    published = load_file(folder / "model.safetensors")
    model = Model(shape)
    wanted = model.state_dict()
    for name, value in wanted.items():
        parts = tensors({name: value}, shape)
        first = next(iter(parts))
        if ".experts." not in first:
            value.copy_(published[first])
            continue
        prefix = first.split(".experts.")[0]
        names = ["down_proj"] if name.endswith("down") else ["gate_proj", "up_proj"]
        for index in range(shape.n_routed_experts):
            value[index] = torch.cat([published[f"{prefix}.experts.{index}.{kind}.weight"] for kind in names])
    model.load_state_dict(wanted)
    return model.eval()


def write(checkpoint: Path, out: Path) -> dict[str, Any]:
    """The whole folder but the model card; returns what stands in training.json."""
    saved = torch.load(checkpoint, weights_only=True)
    shape = Shape()
    out.mkdir(parents=True, exist_ok=True)
    weights = out / "model.safetensors"
    save_file(tensors(saved["model"], shape), weights.with_suffix(".new"), metadata={"format": "pt"})
    assert weights.with_suffix(".new").stat().st_size <= SIZE_BYTES_MAX
    weights.with_suffix(".new").replace(weights)  # whoever has the old one mapped keeps it
    settings = config(shape)
    (out / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    generation = {name: settings[f"{name}_token_id"] for name in ("bos", "eos", "pad")}
    generation = {f"{name}_token_id": value for name, value in generation.items()} | {"do_sample": False}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    source = tokenizer.FOLDER
    if out.resolve() != source:
        for name in ("tokenizer.json", "tokenizer_config.json", template.TEMPLATE.name):
            shutil.copy(source / name, out / name)
    record: dict[str, Any] = {name: saved["place"][name] for name in ("step", "tokens", "length_max")}
    record |= {name: saved[name] for name in ("seed", "batch_tokens", "processes")}
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    record = write(options.checkpoint, options.out)
    size = (options.out / "model.safetensors").stat().st_size
    print(f"{options.out}: step {record['step']}, {record['tokens'] / 1e6:.1f} M tokens, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

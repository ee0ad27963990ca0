"""A whole engine on a GPU: decode of a random-weight model of DeepSeek-V2-Lite's shape, 16 B parameters, and its floor.

    python bench/gpu_engine.py --quick
    python bench/gpu_engine.py --json bench/results/gpu_engine.json

Tokens per second of a user at batch 1 and of all at 64, from the moment at which all sequences have their first token.
The floor of a step: the bytes of the weights that it reads (of the experts those that random tokens choose) and of the
cache, over the read bandwidth measured in this run. Weights are made on the device. Without a GPU nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

from gpu import blank_result, ceilings

from tokenrelay.runtime.build import EngineSizes, build_engine
from tokenrelay.runtime.executor.graphs import Backend
from tokenrelay.runtime.models.config import ModelConfig
from tokenrelay.runtime.models.decoder import Model
from tokenrelay.runtime.models.fields import Fields
from tokenrelay.runtime.models.kv import in_float8
from tokenrelay.runtime.models.registry import architecture_of
from tokenrelay.runtime.requests import EngineOutput, EngineRequest, EngineStats

LITE: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "vocab_size": 102_400,
    "hidden_size": 2048,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "intermediate_size": 10_944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 163_840,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
WAIT_S = 600.0


def random_model(config: dict[str, Any], device: torch.device, *, context_tokens: int, dtype: torch.dtype) -> Model:
    """A model of this config.json with random weights, made on `device`."""
    name, architecture = architecture_of(Fields(config, "config.json"))
    with torch.device("meta"):
        model = Model(architecture, dtype=dtype)
    model = model.to_empty(device=device)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(0.0, parameter.shape[-1] ** -0.5)
    model.finish(
        ModelConfig(
            name="random",
            architecture=name,
            vocab_size=architecture.vocab_size,
            layers=architecture.layers,
            context_tokens=min(context_tokens, architecture.context_tokens),
            eos_token_ids=(),
            kv_layout=architecture.kv_layout(64, 1),
            dtype=dtype,
            identity=secrets.token_bytes(16),
        ),
        device,
    )
    return model


def step_bytes(model: Model, batch: int, context: int) -> int:
    """What a decode step of so many sequences must read: weights once, of the experts those that are chosen at random,
    and of the embedding no more than the rows."""
    moe = model.architecture.moe
    total = 0
    for name, parameter in model.named_parameters():
        size = parameter.numel() * parameter.element_size()
        if name.startswith("embed.") and not model.architecture.tied:
            continue
        if moe is not None and ".experts." in name:
            size = round(size * (1 - (1 - moe.top_k / moe.experts) ** batch))
        total += size
    config = model.config
    return total + batch * context * config.layers * config.kv_layout.bytes_per_block(config.kv_dtype) // 64


def decode(model: Model, batch: int, prompt: int, tokens: int, graphs: Backend | None = None) -> dict[str, float]:
    """Run `batch` sequences at once: tokens per second of all and of each, once all of them decode."""
    changed = threading.Condition()
    counts: dict[int, int] = {}
    first_all_s = 0.0
    ended: list[EngineOutput] = []
    fatal: list[BaseException] = []
    before = 0

    def on_step(outputs: list[EngineOutput], _: EngineStats) -> None:
        nonlocal first_all_s, before
        with changed:
            for output in outputs:
                counts[output.sequence_id] = counts.get(output.sequence_id, 0) + len(output.token_ids)
                if output.finish:
                    ended.append(output)
            if not first_all_s and len(counts) == batch:
                first_all_s, before = time.perf_counter(), sum(counts.values())
            changed.notify_all()

    sizes = EngineSizes(slots=batch, step_tokens=8192, chunk_tokens=4096, context_tokens=prompt + tokens + 1)
    built = build_engine(model, sizes, on_step=on_step, on_fatal=fatal.append, graphs=graphs)
    rng = np.random.default_rng(7)
    built.engine.start()
    try:
        for sequence_id in range(1, batch + 1):
            ids = rng.integers(0, model.config.vocab_size, prompt).astype(np.uint32)
            built.engine.submit(
                EngineRequest(sequence_id=sequence_id, token_ids=ids, output_start=prompt, tokens_max=tokens)
            )
        with changed:
            changed.wait_for(lambda: len(ended) == batch or bool(fatal), WAIT_S)
        took_s = time.perf_counter() - first_all_s
    finally:
        built.engine.close()
    failed = [str(output.error) for output in ended if output.error is not None]
    if fatal or failed or len(ended) < batch:
        raise RuntimeError(f"the run did not end well: {fatal or failed or 'not in time'}")
    per_s = (sum(counts.values()) - before) / took_s
    return {"tokens_per_s": per_s, "tokens_per_s_user": per_s / batch, "ms_per_step": 1e3 * batch / per_s}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer tokens")
    parser.add_argument("--kv-dtype", choices=("auto", "fp8"), default="auto", help="fp8: latents in float8")
    parser.add_argument("--json", type=Path, help="write the result there")
    options = parser.parse_args()
    result = blank_result()
    if result["gpu"] is not None:
        device, prompt, tokens = torch.device("cuda", 0), 2048, 64 if options.quick else 512
        limits = ceilings(device)
        torch.cuda.empty_cache()
        result["figures"] = limits
        model = random_model(LITE, device, context_tokens=8192, dtype=torch.bfloat16)
        if options.kv_dtype == "fp8":
            model.config = in_float8(model.config)
        result["kv_dtype"] = options.kv_dtype
        for batch in (1, 64):
            found: dict[str, Any] = {"batch": batch, "prompt": prompt, **decode(model, batch, prompt, tokens)}
            found["floor_ms"] = step_bytes(model, batch, prompt + tokens // 2) / limits["read_gb_s"] / 1e6
            found["of_floor"] = found["floor_ms"] / found["ms_per_step"]
            result["results"].append(found)
            print(json.dumps(found), flush=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

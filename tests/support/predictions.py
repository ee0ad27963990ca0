"""Checkpoints with a multi-token prediction layer, and what such a layer says by the published formulas.

    folder = make_prediction_checkpoint(tmp_path / "m")
    logits = predicted(folder, hidden, token_ids)       # [n, vocab], float64
    steady = make_steady_checkpoint(tmp_path / "s", noise=0.1)      # its predictions mostly come true

transformers drops these weights, so the oracle is written from DeepSeek-V3's report (arXiv:2412.19437, sections 2.1 and
2.2) in float64, one head, one expert and one token after the other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from checkpoints import make_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

FILE = "model.safetensors"


def make_prediction_checkpoint(folder: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """A small DeepSeek-V3 checkpoint with one prediction layer of random weights, as DeepSeek's files name them."""
    make_checkpoint(folder, "deepseek_v3", seed=seed, num_nextn_predict_layers=1, **overrides)
    tensors, layers = load_file(folder / FILE), _config(folder)["num_hidden_layers"]
    generator = torch.Generator().manual_seed(seed + 1000)
    last, own = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
    dtype = tensors["lm_head.weight"].dtype

    def draw(like: Tensor, name: str) -> Tensor:
        noise = torch.randn(like.shape, generator=generator)
        if "norm" in name:
            return (1 + noise * 0.2).to(dtype)
        return (noise * (0.1 if "bias" in name else 1.5 / like.shape[-1] ** 0.5)).to(like.dtype)

    for name in [name for name in tensors if name.startswith(last)]:
        tensors[own + name.removeprefix(last)] = draw(tensors[name], name)
    hidden = tensors["lm_head.weight"].shape[1]
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{own}{norm}.weight"] = draw(torch.empty(hidden), norm)
    tensors[f"{own}eh_proj.weight"] = draw(torch.empty(hidden, 2 * hidden), "eh_proj").to(dtype)
    tensors[f"{own}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"{own}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    return folder


def make_steady_checkpoint(folder: Path, *, noise: float = 0.0, seed: int = 0, **overrides: Any) -> Path:
    """One whose prediction layer is right about as often as `noise` is small, so that drafts are accepted.

    The model's layers add little to the stream, so that what it says next is mostly a function of the last token; the
    prediction layer looks at the token alone and adds as little.
    """
    make_prediction_checkpoint(folder, seed=seed, **overrides)
    tensors, layers = load_file(folder / FILE), _config(folder)["num_hidden_layers"]
    generator = torch.Generator().manual_seed(seed + 2000)
    own = f"model.layers.{layers}."
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.mul_(0.005)
    hidden = tensors["lm_head.weight"].shape[1]
    eye = torch.eye(hidden)
    mix = torch.cat((eye, torch.zeros(hidden, hidden)), dim=1)
    mix += noise * torch.randn(mix.shape, generator=generator) / hidden**0.5
    tensors[f"{own}eh_proj.weight"] = mix.to(tensors[f"{own}eh_proj.weight"].dtype)
    for norm in ("enorm", "hnorm"):
        tensors[f"{own}{norm}.weight"].fill_(1.0)
    tensors[f"{own}shared_head.norm.weight"] = tensors["model.norm.weight"].clone()
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    return folder


def predicted(folder: Path, hidden: Tensor, token_ids: list[int]) -> Tensor:
    """What the layer says behind each token: [n, vocab] float64.

    `hidden` [n, d]: row j is what the model's head multiplied behind token j. Entry j is made of row j - 1 and token
    j; entry 0, which has none before it, of zeros.
    """
    tensors, config = {k: v.double() for k, v in load_file(folder / FILE).items()}, _config(folder)
    own = f"model.layers.{config['num_hidden_layers']}."
    part = {name.removeprefix(own): tensor for name, tensor in tensors.items() if name.startswith(own)}
    eps = config["rms_norm_eps"]
    before = torch.cat((torch.zeros(1, hidden.shape[1]), hidden[:-1])).double()
    e = _norm(tensors["model.embed_tokens.weight"][token_ids], part["enorm.weight"], eps)
    h = _norm(before, part["hnorm.weight"], eps)
    x = torch.cat((e, h), dim=1) @ part["eh_proj.weight"].T
    x = x + _attention(_norm(x, part["input_layernorm.weight"], eps), part, config)
    normed = _norm(x, part["post_attention_layernorm.weight"], eps)
    x = x + torch.stack([_experts(row, part, config) for row in normed])
    return _norm(x, part["shared_head.norm.weight"], eps) @ tensors["lm_head.weight"].T


def _config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def _rotated(x: Tensor, position: int, theta: float) -> Tensor:
    """Pairs of neighbours turned by position * theta^(-2 i / width)."""
    out = x.clone()
    for i in range(x.shape[0] // 2):
        angle = torch.tensor(position * theta ** (-2 * i / x.shape[0]), dtype=torch.float64)
        a, b = x[2 * i], x[2 * i + 1]
        out[2 * i], out[2 * i + 1] = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
    return out


def _attention(x: Tensor, part: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    heads, nope, rope = config["num_attention_heads"], config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    rank, value = config["kv_lora_rank"], config["v_head_dim"]
    theta = float((config.get("rope_parameters") or config)["rope_theta"])
    c_q = _norm(x @ part["self_attn.q_a_proj.weight"].T, part["self_attn.q_a_layernorm.weight"], 1e-6)
    q = (c_q @ part["self_attn.q_b_proj.weight"].T).view(-1, heads, nope + rope)
    down = x @ part["self_attn.kv_a_proj_with_mqa.weight"].T
    c_kv = _norm(down[:, :rank], part["self_attn.kv_a_layernorm.weight"], 1e-6)
    up = (c_kv @ part["self_attn.kv_b_proj.weight"].T).view(-1, heads, nope + value)
    k_rope = [_rotated(row, j, theta) for j, row in enumerate(down[:, rank:])]
    out = torch.zeros(x.shape[0], heads, value, dtype=torch.float64)
    for j in range(x.shape[0]):
        for head in range(heads):
            q_rope = _rotated(q[j, head, nope:], j, theta)
            scores = [q[j, head, :nope] @ up[i, head, :nope] + q_rope @ k_rope[i] for i in range(j + 1)]
            weights = torch.softmax(torch.stack(scores) / (nope + rope) ** 0.5, 0)
            out[j, head] = weights @ up[: j + 1, head, nope:]
    return out.flatten(1) @ part["self_attn.o_proj.weight"].T


def _experts(x: Tensor, part: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    def swiglu(name: str) -> Tensor:
        gate, up = part[f"{name}.gate_proj.weight"] @ x, part[f"{name}.up_proj.weight"] @ x
        return part[f"{name}.down_proj.weight"] @ (gate * torch.sigmoid(gate) * up)

    scores = torch.sigmoid(part["mlp.gate.weight"] @ x)
    choice = scores + part["mlp.gate.e_score_correction_bias"]
    groups = choice.view(config["n_group"], -1)
    best = groups.topk(2, dim=1).values.sum(1).topk(config["topk_group"]).indices.tolist()
    size = groups.shape[1]
    allowed = [g * size + i for g in best for i in range(size)]
    chosen = sorted(allowed, key=lambda expert: -float(choice[expert]))[: config["num_experts_per_tok"]]
    total = sum(float(scores[expert]) for expert in chosen)
    y = swiglu("mlp.shared_experts")
    for expert in chosen:
        weight = float(scores[expert]) / total * config["routed_scaling_factor"]
        y = y + weight * swiglu(f"mlp.experts.{expert}")
    return y

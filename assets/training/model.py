"""The training twin of transformers' DeepseekV3ForCausalLM, with its parameters stacked so that a CPU trains it.

DeepSeek-V3 (arXiv:2412.19437): multi-head latent attention, sigmoid routing with a selection bias instead of an
auxiliary loss, a shared expert, a dense first layer, and one multi-token-prediction layer. Experts are one tensor
[experts, ...]; tokens are sorted by expert once and each expert runs one matmul. export.py writes the published names.

Shapes: B sequences, T positions, D hidden, H heads, E experts, N = B * T.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The fields of config.json that change the arithmetic, under the names transformers has for them."""

    vocab_size: int = 2304
    hidden_size: int = 256
    intermediate_size: int = 512
    moe_intermediate_size: int = 128
    num_hidden_layers: int = 4
    num_nextn_predict_layers: int = 1
    num_attention_heads: int = 8
    num_key_value_heads: int = 8
    n_shared_experts: int = 1
    n_routed_experts: int = 8
    num_experts_per_tok: int = 2
    n_group: int = 2
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True
    first_k_dense_replace: int = 1
    q_lora_rank: int = 128
    kv_lora_rank: int = 128
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    def save(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self), indent=2))


class Norm(nn.Module):
    """RMSNorm over the last axis, [..., width]."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rotary(positions: int, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, [positions, width // 2], for interleaved pairs."""
    frequency = theta ** (-torch.arange(0, width, 2).float() / width)
    angle = torch.outer(torch.arange(positions).float(), frequency)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (x0, x1), (x2, x3) ... of [B, T, H, width]; the result holds all first halves, then all second."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[: x.shape[1], None, :].to(x.dtype), sin[: x.shape[1], None, :].to(x.dtype)
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), dim=-1)


class Attention(nn.Module):
    """Multi-head latent attention, [B, T, D] -> [B, T, D]; keys and values are expanded, which is best for training."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = s = shape
        heads, width = s.num_attention_heads, s.qk_nope_head_dim + s.qk_rope_head_dim
        self.q_a_proj = nn.Linear(s.hidden_size, s.q_lora_rank, bias=False)
        self.q_a_layernorm = Norm(s.q_lora_rank, s.rms_norm_eps)
        self.q_b_proj = nn.Linear(s.q_lora_rank, heads * width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(s.hidden_size, s.kv_lora_rank + s.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = Norm(s.kv_lora_rank, s.rms_norm_eps)
        self.kv_b_proj = nn.Linear(s.kv_lora_rank, heads * (s.qk_nope_head_dim + s.v_head_dim), bias=False)
        self.o_proj = nn.Linear(heads * s.v_head_dim, s.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        s, (batch, length, _) = self.shape, x.shape
        heads, nope, rope, values = s.num_attention_heads, s.qk_nope_head_dim, s.qk_rope_head_dim, s.v_head_dim
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).view(batch, length, heads, nope + rope)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((s.kv_lora_rank, rope), dim=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).view(batch, length, heads, nope + values)
        k_rope = rotate(k_rope[:, :, None, :], cos, sin).expand(batch, length, heads, rope)
        q = torch.cat((q[..., :nope], rotate(q[..., nope:], cos, sin)), dim=-1).transpose(1, 2)
        k = torch.cat((kv[..., :nope], k_rope), dim=-1).transpose(1, 2)
        seen = self.attend(q, k, kv[..., nope:].transpose(1, 2))
        out: Tensor = self.o_proj(seen.transpose(1, 2).reshape(batch, length, heads * values))
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention, [B, H, T, width] each. Plain matmuls: two to four times faster than the fused CPU kernel's
        backward pass in bfloat16 at these lengths."""
        batch, heads, length, width = q.shape
        future = torch.full((length, length), -torch.inf, dtype=q.dtype).triu(1)
        q, k, v = (x.reshape(batch * heads, length, -1) for x in (q, k, v))
        scores = torch.baddbmm(future.expand(batch * heads, -1, -1), q, k.mT, alpha=width**-0.5)
        return (torch.softmax(scores, dim=-1).to(v.dtype) @ v).view(batch, heads, length, -1)


class Mlp(nn.Module):
    """SwiGLU, [..., D] -> [..., D]."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Moe(nn.Module):
    """Shared expert plus the routed ones. `bias` steers the choice only and is moved by `balance`, not by gradients."""

    bias: Tensor
    load: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = s = shape
        experts, inner, hidden = s.n_routed_experts, s.moe_intermediate_size, s.hidden_size
        self.gate = nn.Parameter(torch.randn(experts, hidden) * hidden**-0.5)
        self.gate_up = nn.Parameter(torch.randn(experts, 2 * inner, hidden) * hidden**-0.5)
        self.down = nn.Parameter(torch.randn(experts, hidden, inner) * inner**-0.5 * 0.5)
        self.shared_experts = Mlp(hidden, inner * s.n_shared_experts)
        self.register_buffer("bias", torch.zeros(experts))
        self.register_buffer("load", torch.zeros(experts), persistent=False)  # tokens since the last `balance`

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[N, D] -> weights and experts, both [N, experts per token]."""
        s = self.shape
        with torch.autocast("cpu", enabled=False):
            scores = torch.sigmoid(F.linear(x.float(), self.gate))
        with torch.no_grad():
            wanted = scores + self.bias
            grouped = wanted.view(len(x), s.n_group, -1)
            groups = grouped.topk(2, dim=-1).values.sum(-1).topk(s.topk_group, dim=-1).indices
            keep = torch.zeros(len(x), s.n_group, dtype=torch.bool).scatter_(1, groups, True)
            chosen = grouped.masked_fill(~keep[..., None], -torch.inf).flatten(1).topk(s.num_experts_per_tok).indices
        weights = scores.gather(1, chosen)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * s.routed_scaling_factor
        return weights, chosen

    def forward(self, x: Tensor) -> Tensor:
        flat, per_token = x.reshape(-1, x.shape[-1]), self.shape.num_experts_per_tok
        weights, chosen = self.route(flat)
        order = chosen.flatten().argsort(stable=True)  # [N * per_token], rows of one expert together
        counts = torch.bincount(chosen.flatten(), minlength=self.shape.n_routed_experts)
        if self.training:
            self.load += counts
        rows = torch.split(flat.index_select(0, order // per_token), counts.tolist())
        outs = []
        for row, gate_up, down in zip(rows, self.gate_up.unbind(0), self.down.unbind(0), strict=True):
            gate, up = F.linear(row, gate_up).chunk(2, dim=-1)
            outs.append(F.linear(F.silu(gate) * up, down))
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        routed = torch.cat(outs).index_select(0, back).view(len(flat), per_token, -1)
        routed = (routed * weights[..., None].to(routed.dtype)).sum(1)
        out: Tensor = routed.view_as(x) + self.shared_experts(x)
        return out

    @torch.no_grad()
    def balance(self, speed: float) -> None:
        """Raise the bias of experts that got less than their share, lower the others' (arXiv:2408.15664)."""
        self.bias += speed * torch.sign(self.load.mean() - self.load)
        self.load.zero_()


class Layer(nn.Module):
    """A decoder layer, [B, T, D] -> [B, T, D]."""

    def __init__(self, shape: Shape, dense: bool) -> None:
        super().__init__()
        self.input_layernorm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = Mlp(shape.hidden_size, shape.intermediate_size) if dense else Moe(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Mtp(nn.Module):
    """Predicts the token after next from the trunk's last state and the next token; shares embedding and head."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.enorm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.hnorm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * shape.hidden_size, shape.hidden_size, bias=False)
        self.layer = Layer(shape, dense=False)
        self.norm = Norm(shape.hidden_size, shape.rms_norm_eps)

    def forward(self, hidden: Tensor, following: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """hidden [B, T, D] is the trunk's normed output, following [B, T, D] the next tokens' embeddings."""
        x = self.eh_proj(torch.cat((self.enorm(following), self.hnorm(hidden)), dim=-1))
        out: Tensor = self.norm(self.layer(x, cos, sin))
        return out


class Model(nn.Module):
    """Token ids [B, T] -> hidden states [B, T, D]; `head` makes them logits [B, T, vocabulary]."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(
            Layer(shape, index < shape.first_k_dense_replace) for index in range(shape.num_hidden_layers)
        )
        self.norm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        self.mtp = Mtp(shape)
        cos, sin = rotary(shape.max_position_embeddings, shape.qk_rope_head_dim, shape.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        nn.init.normal_(self.embed.weight, std=0.3)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        out: Tensor = self.norm(x)
        return out

    def ahead(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """The multi-token-prediction layer's hidden states [B, T - 1, D]: position i predicts token i + 2."""
        out: Tensor = self.mtp(hidden[:, :-1], self.embed(ids[:, 1:]), self.cos, self.sin)
        return out

    def routers(self) -> list[Moe]:
        """Every mixture-of-experts layer."""
        return [module for module in self.modules() if isinstance(module, Moe)]

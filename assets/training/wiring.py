"""Start the model with a copying circuit in place, as far as it takes to save hours of training on a CPU.

All this model does is copying: a city from a question into a call, a result into an answer. From a random start the
circuit for it (a head that notes each token's predecessor, then heads that look for where the present token occurred
and copy what followed; arXiv:2209.11895) forms late: 3.5 M tokens had taught everything else and none of that. So a
few heads begin with it wired, in the spirit of mimetic initialisation (arXiv:2305.09828); training goes on from there.

- Embedding and head are untied, but begin alike: copying a token is then the identity, not a table to be learnt.
- Embedding dimension 0 is a constant, so that a rotary score can depend on the distance alone.
- Layer 0, heads 0 and 1 look at the previous token and write a projection of it to directions of its own.
- The forms of a word (`plan`, ` plan`, `Plan`) begin alike, so that copying from a question into JSON is copying, too.
- Later layers, heads 0 and 1 match the present token against those projections; heads 0 to 3 copy what they look at.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenrelay.assets.training.model import Attention, Model

CONSTANT = 1.5  # embedding dimension 0; the others have a deviation of 0.3
NORMED_CONSTANT = 4.8  # what is left of it after the first norm
PREVIOUS_SHARPNESS = 10.0  # score per rotary frequency
FREQUENCIES = 5
PREVIOUS_GAIN, MATCH_GAIN, COPY_GAIN = 0.6, 2.0, 0.5
FORM_SHARED = 0.85
HEAD_SCALE = 0.05
WIRED = 2  # heads of each kind


def orthonormal(rows: int, columns: int) -> Tensor:
    """Random orthonormal rows that leave the constant dimension alone: [rows, columns]."""
    q, _ = torch.linalg.qr(torch.randn(columns - 1, rows))
    return torch.cat((torch.zeros(rows, 1), q.mT), dim=1)


@torch.no_grad()
def wire(model: Model, tokens: list[str]) -> None:
    """Set what is described above; `tokens` is the vocabulary in byte-level spelling. Draws from torch's generator."""
    shape = model.shape
    _relate_forms(model, tokens)
    model.embed.weight[:, 0] = CONSTANT
    model.head.weight[:, 0] = 0.0
    first = model.layers[0].self_attn
    assert isinstance(first, Attention)
    seen = _wire_previous(first)  # [WIRED * v, D]: what is noted of the previous token
    noted = orthonormal(WIRED * shape.v_head_dim, shape.hidden_size)  # ... and where
    first.o_proj.weight[:, : WIRED * shape.v_head_dim] = PREVIOUS_GAIN * noted.mT
    for layer in model.layers[1:]:
        assert isinstance(layer.self_attn, Attention)
        _wire_matching(layer.self_attn, seen, noted)


def _relate_forms(model: Model, tokens: list[str]) -> None:
    """Give the embeddings (and the head's rows) of a word's forms a common part."""
    words: dict[str, list[int]] = {}
    for index, token in enumerate(tokens):
        word = token.removeprefix("Ġ").lower()  # byte-level spelling of a leading space
        if word.isalpha():
            words.setdefault(word, []).append(index)
    for forms in words.values():
        shared = torch.randn(1, model.shape.hidden_size) * 0.3
        model.embed.weight[forms] = FORM_SHARED * shared + (1 - FORM_SHARED**2) ** 0.5 * model.embed.weight[forms]
    model.head.weight.copy_(model.embed.weight * HEAD_SCALE)


def _wire_previous(attention: Attention) -> Tensor:
    """Look one back; returns the projection [WIRED * v, D] of the embedding that the values are."""
    s = attention.shape
    nope, rope, values, latent = s.qk_nope_head_dim, s.qk_rope_head_dim, s.v_head_dim, s.kv_lora_rank
    key = attention.kv_a_proj_with_mqa.weight
    key[:latent] = orthonormal(latent, s.hidden_size)
    key[latent:] = 0.0
    attention.q_a_proj.weight[0] = 0.0
    attention.q_a_proj.weight[0, 0] = 1.0
    constant = 6.7  # of the query's first latent, after its norm
    for head in range(WIRED):
        query = attention.q_b_proj.weight[head * (nope + rope) : (head + 1) * (nope + rope)]
        query[:] = 0.0
        for index in range(FREQUENCIES):
            theta = s.rope_theta ** (-2 * index / rope)
            key[latent + 2 * index, 0] = 1.5
            size = PREVIOUS_SHARPNESS * math.sqrt(nope + rope) / (1.5 * NORMED_CONSTANT) / constant
            query[nope + 2 * index, 0] = size * math.cos(theta)
            query[nope + 2 * index + 1, 0] = -size * math.sin(theta)
    chosen = torch.eye(latent)[: WIRED * values]
    for head in range(WIRED):
        start = head * (nope + values) + nope
        attention.kv_b_proj.weight[start : start + values] = chosen[head * values : (head + 1) * values]
    return chosen @ key[:latent]


def _wire_matching(attention: Attention, seen: Tensor, noted: Tensor) -> None:
    """Heads 0 and 1: the query is what layer 0 would have noted of the present token, the key what it did note."""
    s = attention.shape
    nope, rope, values, latent = s.qk_nope_head_dim, s.qk_rope_head_dim, s.v_head_dim, s.kv_lora_rank
    width = WIRED * values
    copied = orthonormal(latent - width, s.hidden_size)
    attention.kv_a_proj_with_mqa.weight[:latent] = torch.cat((noted, copied))
    attention.q_a_proj.weight[:width] = seen
    eye = torch.eye(latent)
    for head in range(2 * WIRED):
        part = slice((head % WIRED) * values, (head % WIRED + 1) * values)
        start = head * (nope + values)
        attention.kv_b_proj.weight[start + nope : start + nope + values] = eye[width:][part]
        attention.o_proj.weight[:, head * values : (head + 1) * values] = COPY_GAIN * copied[part].mT
        if head < WIRED:
            attention.kv_b_proj.weight[start : start + nope] = eye[part]
            query = attention.q_b_proj.weight[head * (nope + rope) : (head + 1) * (nope + rope)]
            query[:] = 0.0
            query[:nope, part] = MATCH_GAIN * torch.eye(nope)

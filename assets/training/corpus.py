"""Dialogues as token ids with a weight each, cut into batches: all a function of (seed, chunk)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from tokenrelay.assets.training import template, world

CHUNK_DIALOGUES = 768  # sorted by length within a chunk, so that a batch is padded little
CONTEXT_WEIGHT = 0.08  # what the model reads is easy to predict in part, and no aim by itself
REASONING_SHOWN = 0.7  # in a tool loop a client may or may not send the reasoning back


@dataclass(frozen=True)
class Sample:
    """ids[i] is learnt with weights[i]; both as long as the dialogue."""

    ids: list[int]
    weights: list[float]


class Encoder:
    """Dialogues -> samples."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.start, self.end = tokenizer.token_to_id("<|im_start|>"), tokenizer.token_to_id("<|im_end|>")
        self.pad = tokenizer.token_to_id("<|endoftext|>")
        self.think = tokenizer.token_to_id("<think>")
        self.assistant = tokenizer.encode("assistant\n", add_special_tokens=False).ids

    def sample(self, dialogue: world.Dialogue, rng: random.Random) -> Sample:
        """Assistant tokens weigh 1, the rest little. Where the template dropped a turn's reasoning, its first token
        weighs nothing: the model should think there."""
        messages = [dict(message) for message in dialogue.messages]
        thought = ["reasoning_content" in message for message in messages if message["role"] == "assistant"]
        if rng.random() > REASONING_SHOWN:
            for message in messages[:-1]:
                message.pop("reasoning_content", None)
        text = template.render(messages, dialogue.tools or None)
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        weights, turns, index = [CONTEXT_WEIGHT] * len(ids), iter(thought), 0
        header = len(self.assistant)
        while index < len(ids):
            if ids[index] != self.start or ids[index + 1 : index + 1 + header] != self.assistant:
                index += 1
                continue
            index += 1 + header
            dropped = next(turns) and ids[index] != self.think
            first = index
            while ids[index] != self.end:
                weights[index] = 1.0
                index += 1
            weights[index] = 1.0
            if dropped:
                weights[first] = 0.0
        return Sample(ids, weights)


def batches(encoder: Encoder, seed: int, chunk: int, tokens: int, episodes_max: int) -> list[tuple[Tensor, Tensor]]:
    """The batches of one chunk: ids and weights [B, T], T a multiple of 16, B * T about `tokens`."""
    rng = random.Random(f"corpus:{seed}:{chunk}")
    first = seed * 100_000_000 + chunk * CHUNK_DIALOGUES
    samples = [
        encoder.sample(world.write_train(first + index, episodes_max), rng) for index in range(CHUNK_DIALOGUES)
    ]
    samples.sort(key=lambda sample: len(sample.ids))
    made = list(_cut(samples, tokens, encoder.pad))
    rng.shuffle(made)
    return made


def _cut(samples: list[Sample], tokens: int, pad: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Consecutive samples as padded batches; the last, short one is dropped."""
    held: list[Sample] = []
    for sample in samples:
        held.append(sample)
        length = -(-len(sample.ids) // 16) * 16
        if length * len(held) >= tokens:
            yield collate(held, pad, length)
            held = []


def collate(samples: list[Sample], pad: int, length: int) -> tuple[Tensor, Tensor]:
    """Samples as ids and weights [B, length], padded at the right with weight 0."""
    ids = torch.full((len(samples), length), pad)
    weights = torch.zeros(len(samples), length)
    for row, sample in enumerate(samples):
        ids[row, : len(sample.ids)] = torch.tensor(sample.ids)
        weights[row, : len(sample.ids)] = torch.tensor(sample.weights)
    return ids, weights

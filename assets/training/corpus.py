"""Dialogues as token ids with a weight each, cut into batches: all a function of (seed, chunk)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from tokenrelay.assets.training import template, world
from tokenrelay.assets.training.tokenizer import id_of

CHUNK_DIALOGUES = 768  # sorted by length within a chunk, so that a batch is padded little
CONTEXT_WEIGHT = 0.08  # what the model reads is easy to predict in part, and no aim by itself
DECISION_TOKENS, DECISION_WEIGHT = 4, 6.0  # a thought's first words settle which tool it is, or that there is none
REASONING_SHOWN = 0.7  # in a tool loop a client may or may not send the reasoning back
ASSISTANT, NO_THOUGHT = "<|im_start|>assistant\n", "<think>\n\n</think>\n\n"
QUIET = 0.08  # dialogues whose last turn was asked for with enable_thinking=false


DRILL_TOKENS = 128
DRILL_PERIOD = (6, 44)  # tokens


@dataclass(frozen=True)
class Sample:
    """ids[i] is learnt with weights[i]; both as long as the dialogue."""

    ids: list[int]
    weights: list[float]


class Encoder:
    """Dialogues -> samples."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.end = id_of(tokenizer, "<|im_end|>")
        self.plain_tokens = tokenizer.get_vocab_size(with_added_tokens=False)
        self.pad = id_of(tokenizer, "<|endoftext|>")
        self.think = id_of(tokenizer, "<think>")
        self.assistant = tokenizer.encode(ASSISTANT, add_special_tokens=False).ids
        self.no_thought = tokenizer.encode(NO_THOUGHT, add_special_tokens=False).ids

    def sample(self, dialogue: world.Dialogue, rng: random.Random) -> Sample:
        """Assistant tokens weigh 1, a thought's first ones more, the rest little. Where the template dropped a
        turn's reasoning, its first token weighs nothing: the model should think there."""
        messages = [dict(message) for message in dialogue.messages]
        thought = ["reasoning_content" in message for message in messages if message["role"] == "assistant"]
        shown, quiet = rng.random() < REASONING_SHOWN, rng.random() < QUIET
        for index, message in enumerate(messages):
            if quiet or (not shown and index < len(messages) - 1):
                message.pop("reasoning_content", None)
        text = template.render(messages, dialogue.tools or None)
        if quiet:
            before, header_text, after = text.rpartition(ASSISTANT)
            text = before + header_text + NO_THOUGHT + after
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        weights, turns, index = [CONTEXT_WEIGHT] * len(ids), iter(thought), 0
        header, empty = len(self.assistant), len(self.no_thought)
        while index < len(ids):
            if ids[index : index + header] != self.assistant:
                index += 1
                continue
            index += header
            dropped = next(turns) and ids[index] != self.think
            if ids[index : index + empty] == self.no_thought:  # part of the prompt
                index += empty
            first = index
            index = ids.index(self.end, first) + 1
            weights[first:index] = [1.0] * (index - first)
            if ids[first] == self.think:
                decided = min(first + 1 + DECISION_TOKENS, index)
                weights[first + 1 : decided] = [DECISION_WEIGHT] * (decided - first - 1)
            if dropped:
                weights[first] = 0.0
        return Sample(ids, weights)


def drill(rng: random.Random, vocabulary: int) -> Sample:
    """Random tokens, over and over: only copying predicts them. Some of these early on and copying, which all else
    here rests on, is learnt in a few hundred steps rather than a few thousand (induction heads, arXiv:2209.11895)."""
    period = rng.randint(*DRILL_PERIOD)
    ids = [rng.randrange(vocabulary) for _ in range(period)]
    repeats = -(-DRILL_TOKENS // period)
    return Sample((ids * repeats)[:DRILL_TOKENS], ([0.0] * period + [1.0] * DRILL_TOKENS)[:DRILL_TOKENS])


def batches(
    encoder: Encoder, seed: int, chunk: int, tokens: int, episodes_max: int, drills: int, missing: float
) -> list[tuple[Tensor, Tensor]]:
    """The batches of one chunk: ids and weights [B, T], T a multiple of 16, B * T about `tokens`. `episodes_max` and
    `missing` as in world.write."""
    rng = random.Random(f"corpus:{seed}:{chunk}")
    first = seed * 100_000_000 + chunk * CHUNK_DIALOGUES
    dialogues = (world.write_train(first + index, episodes_max, missing) for index in range(CHUNK_DIALOGUES))
    samples = [encoder.sample(dialogue, rng) for dialogue in dialogues]
    samples += [drill(rng, encoder.plain_tokens) for _ in range(drills)]
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

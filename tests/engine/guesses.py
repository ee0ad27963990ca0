"""Drafts whose guesses a test chooses, and texts that repeat themselves."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from harness import Harness

from tokenrelay.runtime.drafts import Drafter

WIDTH = 6
Guess = Callable[[int, list[int]], Sequence[int]]  # (sequence, tokens known) -> what comes next


class Guessing(Drafter):
    """Drafts whatever a test says, as wide as it may, at every token."""

    def __init__(self, harness: Harness, guess: Guess, tokens_max: int = WIDTH) -> None:
        super().__init__(harness.built.scheduler, tokens_max=tokens_max)
        self.guess = guess

    def _indexed(self, sequence_id: int, text: Any) -> Any:
        text.fresh.clear()
        known = self._scheduler.token_ids(sequence_id)
        tokens = [] if known is None else self.guess(sequence_id, known.tolist())

        class Index:
            def find(self, width: int) -> tuple[Any, int]:
                return np.array(tokens[:width], np.uint32), 5 if tokens else 0

            def __len__(self) -> int:
                return 1

        return Index()

    def _width(self, rate: float, offered: int, won: float, context: int) -> tuple[int, float]:
        return self._tokens_max, 1.0


def guessing(model: Any, guess: Guess, **sizes: Any) -> Harness:
    harness = Harness(model, draft_tokens=WIDTH, **sizes)
    harness.engine._drafter = Guessing(harness, guess)
    return harness


def oracle(texts: dict[int, list[int]], right: int, wrong: int = 0) -> Guess:
    """Knows what will come: `right` tokens of it, then some that will not. `texts`: prompt and output, by sequence."""

    def guess(sequence_id: int, known: list[int]) -> list[int]:
        coming = texts[sequence_id][len(known) :]
        return coming[:right] + [(token + 1) % 7 for token in coming[right : right + wrong]]

    return guess


def repeating(seed: int, vocab: int, length: int = 60) -> list[int]:
    """A prompt that says the same things again and again."""
    rng = random.Random(seed)
    phrases = [[rng.randrange(vocab) for _ in range(rng.randint(4, 9))] for _ in range(3)]
    tokens: list[int] = []
    while len(tokens) < length:
        tokens += rng.choice(phrases)
    return tokens[:length]

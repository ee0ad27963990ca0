"""The engine against the plain loop: whatever the batch, the chunks, the cache and the pressure, the same tokens."""

from __future__ import annotations

import random
from typing import Any

from harness import Harness, plain_greedy

from tokenrelay.runtime.requests import Finish

VOCAB = 384


def prompt_of(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, VOCAB) for _ in range(length)]


def test_greedy_text_is_the_plain_loops(model: Any) -> None:
    prompts = [prompt_of(seed, length) for seed, length in enumerate((1, 5, 16, 17, 40, 70))]
    expected = [plain_greedy(model, prompt, 12) for prompt in prompts]
    with Harness(model) as harness:
        assert harness.run(*prompts, tokens_max=12) == expected
        assert [t.finish for t in harness.transcripts.values()] == [Finish.LENGTH] * len(prompts)
        harness.assert_quiet()

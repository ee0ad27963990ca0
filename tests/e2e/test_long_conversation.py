"""A conversation that grows turn by turn: each turn computes only what it appended, and `cached_tokens` proves it."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import BLOCK_TOKENS, Server

TEXT = "the agent reads a file and writes an answer to its user then it calls another tool and waits for what it says"
WORDS = TEXT.split()


@pytest.mark.parametrize(
    ("turns", "tokens"),
    [
        pytest.param(8, 4_000, id="4k"),
        pytest.param(20, 32_000, id="32k", marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
def test_each_turn_computes_only_what_it_appended(
    start: Callable[..., Server], long_model: Path, turns: int, tokens: int
) -> None:
    server = start(long_model, "--dtype", "float32", "--blocks", tokens // BLOCK_TOKENS * 2)
    rng = random.Random(5)
    dialogue: list[dict[str, Any]] = []
    known: list[int] = []  # ids whose KV stands: the prompt and every fed-back token of the last turn
    for turn in range(turns):
        dialogue.append({"role": "user", "content": text_of(server, rng, tokens // turns - 40)})
        reply = server.chat(*dialogue, max_tokens=16, extra_body={"return_token_ids": True})
        prompt, usage = reply.prompt_token_ids, reply.usage
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(known, prompt, strict=False)))
        expected = common // BLOCK_TOKENS * BLOCK_TOKENS  # and of a block that is shared in part, what it begins with
        assert usage.prompt_tokens == len(prompt)
        assert expected <= (usage.prompt_tokens_details.cached_tokens or 0) <= common, f"turn {turn}"
        if turn:
            # The answer is random bytes: its text may encode to other ids, so that reuse ends at the answer's start.
            assert expected > len(known) - 16 - 2 * BLOCK_TOKENS
            assert usage.prompt_tokens - expected < tokens // turns + 16 + 3 * BLOCK_TOKENS
        known = prompt + reply.choices[0].token_ids[:-1]
        dialogue.append({"role": "assistant", "content": reply.choices[0].message.content})
    assert len(known) >= tokens * 0.95
    page = httpx.get(f"{server.url}/metrics").text
    sent = next(line for line in page.splitlines() if line.startswith('tokenrelay_turns_total{parent="sent"}'))
    assert float(sent.split()[-1]) >= turns - 2, "next turns were sent in full"
    assert 'parent="unknown"' not in page


def text_of(server: Server, rng: random.Random, tokens: int) -> str:
    """About so many tokens of text, by the served tokenizer."""
    words = rng.choices(WORDS, k=tokens)
    ratio = server.tokens(" ".join(words)) / len(words)
    return " ".join(words[: int(tokens / ratio)])

"""Workers of different widths exchange KV: the text is that of one rank, whichever side has more of them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from fleet import Fleet

from tokenrelay.proto import worker_pb2

TP2 = ("--tp", "2")
DP2 = ("--dp", "2")
WAYS = {
    "prefill tp2, decode tp1": {"prefill": TP2},
    "prefill tp1, decode tp2": {"decode": TP2},
    "prefill cp2, decode tp2": {"prefill": ("--cp", "2"), "decode": TP2},
    "prefill pp2, decode dp2": {"prefill": ("--pp", "2"), "decode": DP2},
    "prefill dp2 x tp2, decode pp2 x tp2": {"prefill": (*DP2, *TP2), "decode": ("--pp", "2", *TP2)},
}


def prompt_of(length: int, seed: int) -> list[int]:
    return [random.Random(seed * 1000 + i).randrange(3, 380) for i in range(length)]


@pytest.mark.parametrize(
    ("model", "way"),
    [
        ("mla", "prefill tp2, decode tp1"),
        ("gqa", "prefill tp2, decode tp1"),
        ("gqa", "prefill tp1, decode tp2"),
        ("mla", "prefill cp2, decode tp2"),
        ("mla", "prefill pp2, decode dp2"),
        ("gqa", "prefill dp2 x tp2, decode pp2 x tp2"),
    ],
)
async def test_kv_passes_between_widths(checkpoints: dict[str, Path], model: str, way: str) -> None:
    other = "decode" if "prefill" in WAYS[way] else "prefill"  # of one rank, or at least of another width
    fleet = Fleet(checkpoints[model], more=WAYS[way])
    try:
        await fleet.start()
        base = prompt_of(150, 1)
        prompts = [base, prompt_of(64, 2), [7], base[:128] + prompt_of(30, 3), base]
        texts = []
        for prompt in prompts:
            relayed = await fleet.relay(prompt, 12)
            texts.append(await fleet.finish(relayed))
            assert relayed.source.terminals[0].finish == worker_pb2.FINISH_HANDOVER, fleet.logs(relayed)
            await fleet.settles("prefill", "decode")
        for prompt, text in zip(prompts, texts, strict=True):
            assert text == await fleet.alone(other, prompt, 12), fleet.logs(way)
        # What was pulled is cache there, for a request without a handover.
        again = await fleet.stream("decode", base + [9] * 5, 6)
        assert again.outputs[-1].cached_tokens >= 128
        assert again.token_ids == (await fleet.stream("prefill", base + [9] * 5, 6)).token_ids
    finally:
        await fleet.close()

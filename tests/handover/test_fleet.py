"""Token for token the same text, colocated and disaggregated, over shared memory and gRPC."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from fleet import Fleet

from tokenrelay.proto import worker_pb2
from tokenrelay.transfer.select import available


def prompt_of(length: int, seed: int = 1) -> list[int]:
    return [random.Random(seed * 1000 + i).randrange(3, 380) for i in range(length)]


@pytest.mark.parametrize("kind", available())
@pytest.mark.parametrize("model", ["mla", "gqa"])
async def test_the_text_is_the_same(checkpoints: dict[str, Path], kind: str, model: str) -> None:
    fleet = Fleet(checkpoints[model], transport=kind)
    try:
        await fleet.start()
        base = prompt_of(100)
        prompts = [
            base,
            prompt_of(64, 2),
            [7],
            base[:80] + prompt_of(30, 3),
            base,
        ]  # full blocks only; one token; reuse
        for prompt in prompts:
            relayed = await fleet.relay(prompt, 12)
            texts = await fleet.finish(relayed)
            assert relayed.source.terminals[0].finish == worker_pb2.FINISH_HANDOVER, fleet.logs(relayed)
            assert relayed.finish == worker_pb2.FINISH_LENGTH, fleet.logs(relayed.destination.terminals)
            assert len(relayed.source.token_ids) == 1
            assert texts == await fleet.alone("prefill", prompt, 12)
            await fleet.settles("prefill", "decode")
        reused = relayed.source.outputs[-1].cached_tokens
        assert reused >= 80  # the last prompt repeats the first
    finally:
        await fleet.close()


async def test_many_at_once(fleet: Fleet) -> None:
    prompts = [prompt_of(20 + 17 * i, i % 3) for i in range(12)]
    relayed = await asyncio.gather(*(fleet.relay(prompt, 8) for prompt in prompts))
    texts = await asyncio.gather(*(fleet.finish(each) for each in relayed))
    for prompt, text in zip(prompts, texts, strict=True):
        assert text == await fleet.alone("decode", prompt, 8)
    await fleet.settles("prefill", "decode")

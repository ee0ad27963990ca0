"""Workers of different widths exchange KV: the text is that of one rank, whichever side has more of them."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from fleet import Fleet
from worker_process import WorkerProcess

from tokenrelay.proto import worker_pb2

TP2 = ("--tp", "2")
WAYS = {
    "prefill tp2, decode tp1": {"prefill": TP2},
    "prefill tp1, decode tp2": {"decode": TP2},
    "prefill cp2, decode tp2": {"prefill": ("--cp", "2"), "decode": TP2},
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


async def test_a_member_whose_ranks_hold_parts_of_a_sequence_is_refused(checkpoints: dict[str, Path]) -> None:
    flags = ("--role", "prefill", "--name", "p", "--kvstore", "127.0.0.1:9", "--dp", "2")
    worker = WorkerProcess(*flags, model=checkpoints["mla"])
    try:
        settled = await asyncio.to_thread(worker.wait_settled)
        assert settled["event"] != "ready"
        assert "along dp and pp no rank has all of it" in str(settled), settled
        assert await asyncio.to_thread(worker.wait) != 0
    finally:
        worker.close()

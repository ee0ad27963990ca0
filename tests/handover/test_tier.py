"""The fleet's block tier: a prefix that another worker computed is loaded, and whatever goes wrong is computed."""

from __future__ import annotations

import asyncio
import random
import signal
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fleet import Fleet

from tokenrelay.proto import worker_pb2

PROMPT = [random.Random(i).randrange(3, 380) for i in range(150)]  # 9 blocks of 16 and a part of one


def written(fleet: Fleet, role: str, counter: str = 'tier_blocks_total{end="written"}') -> int:
    """A counter of this worker's page."""
    port = fleet.workers[role].status[-1]["admin_port"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as reply:
        lines = reply.read().decode().splitlines()
    return int(float(next((line.rsplit(" ", 1)[1] for line in lines if counter in line and line[0] != "#"), 0)))


async def until(fleet: Fleet, role: str, count: int, counter: str = 'tier_blocks_total{end="written"}') -> None:
    for _ in range(200):
        if await asyncio.to_thread(written, fleet, role, counter) >= count:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(fleet.logs(counter))


async def cached(fleet: Fleet, role: str, prompt: list[int], **fields: object) -> tuple[list[int], int]:
    """The text, and how much of the prompt was not computed."""
    stream = await fleet.stream(role, prompt, 8, **fields)
    return stream.token_ids, max(output.cached_tokens for output in stream.outputs)


@pytest.fixture
async def tiered(checkpoints: dict[str, Path]) -> AsyncIterator[Fleet]:
    fleet = Fleet(checkpoints["mla"])
    fleet.flags += ["--block-tier", "true", "--block-tier-tokens-min", "32"]
    try:
        await fleet.start()
        yield fleet
    finally:
        await fleet.close()


async def test_what_a_dead_worker_computed_is_loaded(tiered: Fleet) -> None:
    text, _ = await cached(tiered, "prefill", PROMPT)
    await until(tiered, "prefill", 9)
    tiered.workers["prefill"].signal(signal.SIGKILL)
    assert await cached(tiered, "decode", PROMPT, salt=b"another tenant") == (text, 0)
    assert await cached(tiered, "decode", PROMPT) == (text, 9 * 16)
    assert written(tiered, "decode", "tier_tokens_loaded_total") == 9 * 16
    await tiered.settles("decode")


async def test_a_source_loads_what_it_hands_over(tiered: Fleet) -> None:
    """Half of the prompt is in the source's own cache, the other half in the tier."""
    text, _ = await cached(tiered, "decode", PROMPT)
    await until(tiered, "decode", 9)
    await cached(tiered, "prefill", PROMPT[:70])
    relayed = await tiered.relay(PROMPT, 8)
    assert await tiered.finish(relayed) == text
    assert relayed.source.terminals[0].finish == worker_pb2.FINISH_HANDOVER
    assert max(output.cached_tokens for output in relayed.source.outputs) == 9 * 16
    await tiered.settles("prefill", "decode")


async def test_without_a_kvstore_it_is_computed(tiered: Fleet) -> None:
    text, _ = await cached(tiered, "prefill", PROMPT)
    await until(tiered, "prefill", 9)
    tiered.kvstore.signal(signal.SIGSTOP)
    try:
        assert await asyncio.wait_for(cached(tiered, "decode", PROMPT), 20) == (text, 0)
    finally:
        tiered.kvstore.signal(signal.SIGCONT)

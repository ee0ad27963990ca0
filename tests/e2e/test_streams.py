"""Many streams at once, a third of them cut off by their clients: the others come whole, and no block is lost."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from load import Outcome, metrics, pool, send, settled_pool
from serving import Server


@pytest.fixture(scope="module")
def server(start: Callable[..., Server], random_model: Path) -> Server:
    """A pool that 64 sequences do not fit into at once, so that some wait and some are preempted."""
    return start(random_model, "--dtype", "float32", "--blocks", 96, "--block-tokens", 16, "--slots", 32)


@pytest.mark.parametrize("seed", [1, 2])
async def test_64_streams_a_third_aborted(server: Server, seed: int) -> None:
    rng = random.Random(seed)
    aborted = set(rng.sample(range(64), 21))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        before = await settled_pool(session, server.url)
        bodies = [request(rng, server.model, number) for number in range(64)]
        after = [rng.choice((0, 1, 3, 10)) if number in aborted else None for number in range(64)]
        outcomes = await asyncio.gather(
            *(
                send(session, server.url, "/v1/chat/completions", body, abort_after=cut)
                for body, cut in zip(bodies, after, strict=True)
            )
        )
        settled = await settled_pool(session, server.url)
        found = await metrics(session, server.url)
    check(outcomes, aborted, bodies)
    assert settled.active == 0, "leaked blocks"
    assert settled.total == before.total == 96
    assert found, "no metrics"


def request(rng: random.Random, model: str, number: int) -> dict[str, Any]:
    """A stream of known length: nothing but its limit ends it. Half of them share a prefix."""
    shared = "The agent reads a file and writes the answer. " * 4 if number % 2 else ""
    return {
        "model": model,
        "messages": [{"role": "user", "content": f"{shared}Request {number} of {rng.random()}."}],
        "max_tokens": rng.randint(12, 48),
        "temperature": 1.0,
        "seed": number,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def check(outcomes: list[Outcome], aborted: set[int], bodies: list[dict[str, Any]]) -> None:
    problems = [f"request {number}: {problem}" for number, o in enumerate(outcomes) for problem in o.problems]
    assert problems == []
    kinds = Counter(outcome.kind for number, outcome in enumerate(outcomes) if number not in aborted)
    assert kinds == {"completed": 43}, [o.error for o in outcomes if o.error]
    for number, (outcome, body) in enumerate(zip(outcomes, bodies, strict=True)):
        if number not in aborted:
            assert outcome.finish_reasons == {0: "length"}
            assert outcome.completion_tokens == body["max_tokens"]


async def test_what_a_stream_says_does_not_depend_on_its_neighbours(server: Server) -> None:
    """The same request alone and among others gives the same text, in float32: no sequence reads another's blocks."""
    rng = random.Random(3)
    bodies = [request(rng, server.model, number) for number in range(12)]
    path = "/v1/chat/completions"
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        together = await asyncio.gather(*(send(session, server.url, path, body) for body in bodies))
        alone = [await send(session, server.url, path, body) for body in bodies]
        assert (await pool(session, server.url)).total == 96
    assert [outcome.text for outcome in alone] == [outcome.text for outcome in together]
    assert len({outcome.text for outcome in alone}) == 12

"""Drafts of a prediction layer, end to end: they come true, and nobody sees more of them than their speed."""

from __future__ import annotations

import asyncio
import signal
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from load import metrics, send, settled_pool
from predictions import make_steady_checkpoint
from serving import Server

PATH = "/v1/chat/completions"
CHOICES = ["the left side of it", "the right side of it"]


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of so many layers that one more of them is worth its time."""
    return make_steady_checkpoint(tmp_path_factory.mktemp("models") / "steady", num_hidden_layers=24)


def body(server: Server, number: int, **parameters: Any) -> dict[str, Any]:
    """Request `number`: greedy where it is even, sampled with a seed where it is odd."""
    sampling = {"temperature": 0} if number % 2 == 0 else {"temperature": 0.6, "seed": number}
    message = {"role": "user", "content": f"number {number} " * (1 + number % 5)}
    return {"model": server.model, "messages": [message], "ignore_eos": True, **sampling, **parameters}


async def answers(server: Server, numbers: range, tokens: int, at_once: int = 1) -> list[str]:
    turn = asyncio.Semaphore(at_once)

    async def ask(session: aiohttp.ClientSession, number: int) -> Any:
        async with turn:
            wanted = body(server, number, max_tokens=tokens, stream=number % 3 > 0)
            return await send(session, server.url, PATH, wanted)

    async with aiohttp.ClientSession() as session:
        found = await asyncio.gather(*(ask(session, number) for number in numbers))
    assert all(one.kind == "completed" and one.problems == [] for one in found), [one.error for one in found]
    return [one.text for one in found]


async def test_answers_are_the_same_and_most_drafts_come_true(start: Callable[..., Server], steady: Path) -> None:
    texts: list[list[str]] = []
    ways = {
        "mtp": ("--drafts", "mtp"),
        "ngram": ("--draft-tokens", "3"),
        "": ("--drafts", "off", "--draft-tokens", "3"),
    }
    for way, flags in ways.items():  # on a CPU `auto` takes n-grams
        server = start(steady, "--dtype", "float32", *flags)
        texts.append(await answers(server, range(3), 200))
        async with aiohttp.ClientSession() as session:
            page = await metrics(session, server.url)
            formed = body(server, 0, structured_outputs={"choice": CHOICES}, max_tokens=60) | {"ignore_eos": False}
            reply = await send(session, server.url, PATH, formed)
            assert reply.kind == "completed" and reply.text in CHOICES, reply.error
            texts[-1].append(reply.text)
            assert (await settled_pool(session, server.url)).active == 0
        for proposer in ("mtp", "ngram"):
            drafted = page[f'tokenrelay_spec_decode_proposer_draft_tokens_total{{proposer="{proposer}"}}']
            rate = page[f'tokenrelay_spec_decode_proposer_acceptance_rate{{proposer="{proposer}"}}']
            assert (drafted > 20 and rate > 0.4) if proposer == way else drafted == 0, (way, proposer, drafted, rate)
        server.signal(signal.SIGTERM)
        assert server.end() == 0
    assert texts[0] == texts[1] == texts[2]


async def test_a_checkpoint_without_the_layer(start: Callable[..., Server], random_model: Path) -> None:
    """`auto` guesses from the text; `mtp` says what is missing."""
    server = start(random_model, "--draft-tokens", "2")
    assert len((await answers(server, range(1), 8))[0]) > 0
    with pytest.raises(Exception, match="has no multi-token prediction layer"):
        start(random_model, "--drafts", "mtp")


async def test_a_killed_worker_costs_nobody_a_token(
    start: Callable[..., Server], steady: Path, kill: Callable[[int], None], tmp_path: Path
) -> None:
    """Sequences with drafts go on at another worker with the tokens they have, greedy and sampled."""
    config = tmp_path / "relay.toml"
    config.write_text('[worker]\ndrafts = "mtp"\n')
    server = start(steady, "--workers", 2, "--dtype", "float32", "--config", config, command="up")
    wanted = await answers(server, range(6), 300, at_once=6)

    def page() -> list[str]:
        with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as response:
            return str(response.read(), "utf-8").splitlines()

    def said() -> float:
        found = [line for line in page() if line.startswith("tokenrelay_worker_output_tokens_total")]
        return sum(float(line.split()[-1]) for line in found)

    before = await asyncio.to_thread(said)
    running = asyncio.ensure_future(answers(server, range(6), 300, at_once=6))
    while await asyncio.to_thread(said) < before + 200:
        assert not running.done(), "it was over before a worker could be killed"
        await asyncio.sleep(0.02)
    kill(int(server.facts["worker-1_pid"]))
    assert await asyncio.wait_for(running, 120) == wanted
    moved = [line for line in await asyncio.to_thread(page) if 'tokenrelay_moves_total{cause="lost"}' in line]
    assert moved and float(moved[0].split()[-1]) > 0

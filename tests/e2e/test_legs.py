"""`tokenrelay up --prefill --decode`: one worker computes a prompt, another one decodes, and clients cannot tell."""

from __future__ import annotations

import asyncio
import json
import signal
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from checkpoints import make_checkpoint
from load import send, settled_pool
from mesh_calls import PATH, body, counted, run, workers
from serving import Server, until

TOKENS = 2000  # some tenths of a second, so that a worker can be killed in the midst of it
FLAGS = ("--dtype", "float32")
Start = Callable[..., Server]
ALONE: dict[str, list[Any]] = {}  # what one worker says, by model
SLOW = pytest.mark.slow


def settings(folder: Path, more: str = "") -> Path:
    """A configuration file with which every prompt is handed over."""
    path = folder / "legs.toml"
    path.write_text(f'[router]\nremote_prefill = "always"\n[worker]\nthreads = 1\n{more}')
    return path


def ask(server: Server, messages: list[dict[str, str]], **parameters: Any) -> dict[str, Any]:
    """One unary answer."""
    wanted = {"model": server.model, "messages": messages, "temperature": 0, **parameters}
    request = urllib.request.Request(
        server.url + PATH, json.dumps(wanted).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        answer: dict[str, Any] = json.load(reply)
    return answer


def conversation(server: Server) -> list[Any]:
    """What a client sees of three turns and of requests of other shapes; usage without what caches decide."""
    seen: list[Any] = []

    def note(answer: dict[str, Any]) -> str:
        usage = answer["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        choices = [(c["index"], c["message"]["content"], c["finish_reason"]) for c in answer["choices"]]
        ids = [[one["token"] for one in (c.get("logprobs") or {}).get("content", [])] for c in answer["choices"]]
        seen.append((usage["prompt_tokens"], usage["completion_tokens"], choices, ids))
        return str(answer["choices"][0]["message"]["content"])

    messages = [{"role": "user", "content": "Write a function that walks a tree and prints each node. " * 12}]
    for _ in range(3):
        text = note(ask(server, messages, max_tokens=24, ignore_eos=True, logprobs=True))
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "And now backwards. " * 10}]
    note(ask(server, messages[:1], max_tokens=1))
    note(ask(server, messages[:1], max_tokens=12, n=3, temperature=1.0, seed=5, ignore_eos=True, logprobs=True))
    text = seen[0][2][0][1]
    note(ask(server, messages[:1], max_tokens=24, ignore_eos=True, stop=[text[len(text) // 2 :][:6]]))
    return seen


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory, random_model: Path) -> Callable[[str], Path | None]:
    def find(kind: str) -> Path | None:
        if kind == "bundled":
            return None
        return random_model if kind == "mla" else make_checkpoint(tmp_path_factory.mktemp("models") / "gqa", "qwen3")

    return find


@pytest.mark.parametrize(
    ("kind", "transport"),
    [
        ("mla", "shared"),
        pytest.param("mla", "stream", marks=SLOW),
        pytest.param("mla", "nixl", marks=SLOW),
        pytest.param("gqa", "shared", marks=SLOW),
        pytest.param("gqa", "stream", marks=SLOW),
        pytest.param("gqa", "nixl", marks=SLOW),
        pytest.param("bundled", "shared", marks=SLOW),
        pytest.param("bundled", "nixl", marks=SLOW),
        pytest.param("bundled", "stream", marks=SLOW),
    ],
)
def test_the_same_answers_as_one_worker(
    start: Start, model_of: Callable[[str], Path | None], kind: str, transport: str, tmp_path: Path
) -> None:
    """Greedy and seeded texts, ids, usage, with prefix reuse, n > 1, one token, stop strings: token for token."""
    model = model_of(kind)
    arguments = [*([model] if model else []), *FLAGS]
    file = settings(tmp_path, f'[fleet]\ntransports = ["{transport}"]\n')
    legs = start(*arguments, "--prefill", 1, "--decode", 1, "--config", file, command="up")
    found = conversation(legs)
    handovers = counted(legs, "handovers_total")
    # three turns and three choices; one token; the text that a stop string ended, or its worker was faster
    handovers['end="done"'] += handovers.pop('end="aborted"', 0)
    assert counted(legs, "moves_total") == {}
    assert handovers == {'end="done"': 7, 'end="first_token"': 1}, handovers
    legs.own.stop()
    if kind not in ALONE:
        alone = start(*arguments)
        ALONE[kind] = conversation(alone)
        alone.own.stop()
    assert found == ALONE[kind]


@pytest.fixture(scope="module")
def fleet(start: Start, random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Server:
    file = settings(tmp_path_factory.mktemp("settings"))
    return start(random_model, *FLAGS, "--prefill", 2, "--decode", 2, "--config", file, command="up")


async def settled(server: Server) -> None:
    async with aiohttp.ClientSession() as session:
        pool = await settled_pool(session, server.url)
    assert pool.active == 0, json.dumps(workers(server))


async def test_a_killed_decode_worker_costs_nobody_a_token(fleet: Server, kill: Callable[[int], None]) -> None:
    wanted = await run(fleet, range(4), TOKENS)
    assert len(set(wanted)) == 4
    begun = asyncio.Event()
    running = asyncio.ensure_future(run(fleet, range(4), TOKENS, begun))
    await asyncio.wait_for(begun.wait(), 60)
    kill(int(fleet.facts["decode-1_pid"]))
    assert await asyncio.wait_for(running, 120) == wanted
    moves = await asyncio.to_thread(counted, fleet, "moves_total")
    assert moves.get('cause="lost"', 0) > 0, "nothing moved"
    await asyncio.to_thread(until, lambda: all(one["ready"] for one in workers(fleet)))


async def test_a_killed_prefill_worker_costs_nobody_a_token(fleet: Server, kill: Callable[[int], None]) -> None:
    """Killed while it computes prompts: they are computed elsewhere."""

    async def ask_all(begun: Callable[[], None] | None = None) -> list[str]:
        async with aiohttp.ClientSession() as session:

            async def one(number: int) -> str:
                text = f"{number} " * 1200
                wanted = {"model": fleet.model, "messages": [{"role": "user", "content": text}], "temperature": 0}
                outcome = await send(session, fleet.url, PATH, {**wanted, "max_tokens": 8, "ignore_eos": True})
                assert outcome.kind == "completed", outcome
                return str(outcome.text)

            asked = [asyncio.ensure_future(one(number)) for number in range(10, 16)]
            if begun is not None:
                await asyncio.to_thread(begun)
            return await asyncio.gather(*asked)

    pid = int(fleet.facts["prefill-1_pid"])

    def computing_then_killed() -> None:
        def busy() -> bool:
            return any(one["open"] > 0 for one in workers(fleet) if one["target"].endswith("prefill-1.sock"))

        until(busy)
        kill(pid)

    found = await asyncio.wait_for(ask_all(computing_then_killed), 120)
    moves = await asyncio.to_thread(counted, fleet, "moves_total")
    await asyncio.to_thread(until, lambda: all(one["ready"] for one in workers(fleet)))
    assert found == await asyncio.wait_for(ask_all(), 120)
    assert sum(moves.values()) > 0, "nothing moved"


async def test_the_decode_worker_explains_what_it_was_handed(fleet: Server) -> None:
    await asyncio.to_thread(until, lambda: all(one["ready"] and one["connections"] for one in workers(fleet)))
    async with aiohttp.ClientSession() as session:
        wanted = body(fleet, 0, max_tokens=2000, stream=True, expected_output_tokens=600)
        headers = {"X-Request-Id": "explained", "X-TPS-Floor": "30"}
        async with session.post(fleet.url + PATH, json=wanted, headers=headers) as response:
            for _ in range(20):  # some tokens: it decodes
                await response.content.readline()
            async with session.get(f"{fleet.url}/debug/requests/explained") as answer:
                found = await answer.json()
    assert found["problems"] == {}
    (one,) = found["requests"]
    assert "decode-" in one["worker"], one
    assert "prefill at" in one["placement"], one
    assert (one["tps_floor"], one["expected_tokens"]) == (30, 600), "hints come to whoever decodes"


async def test_an_abort_leaves_nothing_behind(fleet: Server) -> None:
    async with aiohttp.ClientSession() as session:
        for number in range(4):
            wanted = body(fleet, number, max_tokens=2000, stream=True)
            async with session.post(fleet.url + PATH, json=wanted) as response:
                if number % 2:
                    await response.content.readline()
    await settled(fleet)
    await asyncio.to_thread(until, lambda: all(one["open"] == 0 for one in workers(fleet)))


async def test_a_rolling_restart_of_every_service_loses_no_request(fleet: Server) -> None:
    before = {one["incarnation"] for one in workers(fleet)}
    wanted = await run(fleet, range(4), 16)
    over, outcomes = asyncio.Event(), []

    async def client(number: int) -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as session:
            while not over.is_set():
                stream = bool(len(outcomes) % 2)
                asked = body(fleet, number, max_tokens=16, stream=stream)
                outcomes.append((number, await send(session, fleet.url, PATH, asked)))
                await asyncio.sleep(0.1)  # two cores

    clients = [asyncio.ensure_future(client(number)) for number in range(4)]
    await asyncio.sleep(0.5)
    fleet.signal(signal.SIGUSR2)

    def replaced() -> bool:
        try:
            now = workers(fleet)
        except OSError:
            return False
        new = all(one["ready"] and one["incarnation"] not in before and one["connections"] == 1 for one in now)
        return new and len(now) == 4

    try:
        await asyncio.to_thread(until, replaced, 240)
        await asyncio.sleep(0.5)
    finally:
        over.set()
        await asyncio.wait_for(asyncio.gather(*clients), 120)
    assert len(outcomes) > 8
    assert [(number, one.status, one.error) for number, one in outcomes if one.kind != "completed"] == []
    assert all(one.problems == [] and one.text == wanted[number] for number, one in outcomes)


async def test_afterwards_it_drains(fleet: Server) -> None:
    await settled(fleet)
    fleet.signal(signal.SIGTERM)
    assert await asyncio.to_thread(fleet.end) == 0

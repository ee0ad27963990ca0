"""Births and deaths: what clients and operators see when processes die, drain, or cannot start."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from checkpoints import make_checkpoint
from load import metrics, send, settled_pool
from serving import Server, alive, until

LONG = {"max_tokens": 3900, "ignore_eos": True, "temperature": 1.0, "stream": True}  # a second or more


def body(server: Server, text: str = "x", **parameters: Any) -> dict[str, Any]:
    return {"model": server.model, "messages": [{"role": "user", "content": text}], **parameters}


async def test_a_killed_worker_ends_every_request_and_comes_back(
    start: Callable[..., Server], random_model: Path, kill: Callable[[int], None]
) -> None:
    server = start(random_model, "--dtype", "float32")
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        path = "/v1/chat/completions"
        streams = [asyncio.ensure_future(send(session, server.url, path, body(server, **LONG))) for _ in range(6)]
        whole = asyncio.ensure_future(send(session, server.url, path, body(server, **{**LONG, "stream": False})))
        await until_running(session, server, 7)
        kill(server.worker_pid)
        ended = await asyncio.wait_for(asyncio.gather(*streams, whole), 20)
        for outcome in ended:
            assert outcome.problems == []
            assert outcome.error, "no terminal error"
            assert outcome.kind == ("errored" if outcome.status == 200 else "refused")
        assert ended[-1].status == 503
        statuses = await watch_ready(session, server)
        assert statuses[0] == 503, "/ready says that a dead worker is ready"
        assert statuses[-1] == 200
        async with session.get(f"{server.url}/health") as health:
            assert health.status == 200, "the router lives on"
        after = await send(session, server.url, path, body(server, max_tokens=4, ignore_eos=True))
        assert after.kind == "completed", after.error
        assert (await settled_pool(session, server.url)).active == 0


async def test_the_tps_floor_is_served_and_measured(start: Callable[..., Server]) -> None:
    """`--tps-floor` reaches the scheduler, and what it measured comes back on /metrics."""
    server = start("--tps-floor", "33", "--floor-wait-s", "3")
    async with aiohttp.ClientSession() as session:
        answer = await send(session, server.url, "/v1/chat/completions", body(server, max_tokens=24, ignore_eos=True))
        assert answer.kind == "completed", answer.error
        page = await metrics(session, server.url)
    floor = {name.split("{")[0]: value for name, value in page.items() if name.startswith("tokenrelay_tps_floor_")}
    assert floor["tokenrelay_tps_floor_configured"] == 33
    assert floor["tokenrelay_tps_floor_batch_1"] > 1
    half = floor["tokenrelay_tps_floor_batch_1"] / 2
    assert floor["tokenrelay_tps_floor_in_force"] == pytest.approx(min(33, half), rel=1e-3)
    assert floor["tokenrelay_tps_floor_tokens_total"] > 0


async def test_a_requests_own_floor_and_length_are_the_schedulers(start: Callable[..., Server]) -> None:
    server = start("--tps-floor", "33")
    wanted = body(server, max_tokens=3600, ignore_eos=True, stream=True, tps_floor=12)
    headers = {"X-Request-Id": "hinted", "X-Expected-Output-Tokens": "300"}
    async with (
        aiohttp.ClientSession() as session,
        session.post(server.url + "/v1/chat/completions", json=wanted, headers=headers) as response,
    ):
        await response.content.readline()
        async with session.get(f"{server.url}/debug/requests/hinted") as answer:
            (one,) = (await answer.json())["requests"]
    assert (one["tps_floor"], one["expected_tokens"]) == (12, 300)
    assert "asks for 12 tokens/s" in one["text"] and "(300 expected)" in one["text"]


async def test_drafts_change_no_answer_and_are_counted(start: Callable[..., Server]) -> None:
    """The same conversation with `--draft-tokens` and without: the same text, one chunk or several."""
    asked: Any = {"max_tokens": 120, "ignore_eos": True, "temperature": 0}
    texts, pages = [], []
    for width in ("8", "0"):
        server = start("--draft-tokens", width, "--dtype", "float32")
        async with aiohttp.ClientSession() as session:
            url = f"{server.url}/v1/chat/completions"
            async with session.post(url, json=body(server, "Say it again and again: one two three.", **asked)) as reply:
                assert reply.status == 200
                answer = await reply.json()
            texts.append(answer["choices"][0]["message"]["content"])
            assert answer["usage"]["completion_tokens"] == 120
            streamed = await send(session, server.url, "/v1/chat/completions", body(server, **asked, stream=True))
            assert streamed.kind == "completed", streamed.error
            assert (await settled_pool(session, server.url)).active == 0
            pages.append(await metrics(session, server.url))
        server.signal(signal.SIGTERM)
        assert server.end() == 0
    assert texts[0] == texts[1]
    drafted, plain = pages
    assert drafted["tokenrelay_spec_decode_num_draft_tokens_total"] > 0
    assert drafted["tokenrelay_spec_decode_num_drafts_total"] > 0
    assert 0 <= drafted["tokenrelay_spec_decode_draft_acceptance_rate"] <= 1
    assert plain["tokenrelay_spec_decode_num_draft_tokens_total"] == 0


async def until_running(session: aiohttp.ClientSession, server: Server, count: int) -> None:
    """Until so many sequences hold blocks."""
    for _ in range(2000):
        found = await metrics(session, server.url)
        if (
            sum(v for name, v in found.items() if name.startswith("tokenrelay_sequences") and "running" in name)
            >= count
        ):
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"never {count} running: {found}")


async def watch_ready(session: aiohttp.ClientSession, server: Server) -> list[int]:
    """The statuses of /ready until it is 200 again."""
    seen: list[int] = []
    for _ in range(1200):
        async with session.get(f"{server.url}/ready") as ready:
            seen.append(ready.status)
        if seen[-1] == 200:
            break
        await asyncio.sleep(0.05)
    return seen


async def test_modules_in_the_folder_where_it_starts_are_none_of_ours(
    start: Callable[..., Server], random_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("queue", "types", "tokenizers", "nt"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a file of the user was imported')\n")
    monkeypatch.chdir(tmp_path)
    server = start(random_model, "--dtype", "float32")
    async with aiohttp.ClientSession() as session:
        answer = await send(session, server.url, "/v1/chat/completions", body(server, max_tokens=2, ignore_eos=True))
    assert answer.kind == "completed", answer.error


async def test_the_first_signal_drains(start: Callable[..., Server], random_model: Path) -> None:
    server = start(random_model, "--dtype", "float32")
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        running = asyncio.ensure_future(send(session, server.url, "/v1/chat/completions", body(server, **LONG)))
        await until_running(session, server, 1)
        server.signal(signal.SIGTERM)
        outcome = await running
    assert outcome.kind == "completed", (outcome.error, outcome.problems)
    assert outcome.finish_reasons == {0: "length"}
    assert server.end() == 0
    assert not alive(server.worker_pid)
    assert not alive(int(server.facts["router_pid"]))


async def test_a_second_signal_stops_at_once(start: Callable[..., Server], long_model: Path) -> None:
    server = start(long_model, "--dtype", "float32")
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        request = send(session, server.url, "/v1/chat/completions", body(server, **{**LONG, "max_tokens": 30_000}))
        running = asyncio.ensure_future(request)
        await until_running(session, server, 1)
        server.signal(signal.SIGTERM)
        await asyncio.sleep(0.3)
        assert not running.done()
        began = time.monotonic()
        server.signal(signal.SIGTERM)
        outcome = await asyncio.wait_for(running, 10)
    assert outcome.error or outcome.problems
    assert server.end(10) == 128 + signal.SIGTERM
    assert time.monotonic() - began < 8
    assert not alive(server.worker_pid)


async def test_a_full_queue_answers_429(start: Callable[..., Server], random_model: Path) -> None:
    server = start(random_model, "--dtype", "float32", "--slots", 1, "--waiting-max", 2)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        path, request = "/v1/chat/completions", body(server, max_tokens=100, ignore_eos=True)
        outcomes = await asyncio.gather(*(send(session, server.url, path, request) for _ in range(10)))
        assert [o.problems for o in outcomes if o.problems] == []  # one of them would be a 429 without Retry-After
        assert {o.kind for o in outcomes} == {"completed", "refused"}
        assert {o.status for o in outcomes if o.kind == "refused"} == {429}
        assert sum(o.kind == "completed" for o in outcomes) >= 3
        assert (await settled_pool(session, server.url)).active == 0


def serve(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """`tokenrelay serve` that is expected to end by itself."""
    command = [sys.executable, "-m", "tokenrelay.cli.main", "serve", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """The one sentence it said; logs are JSON and do not count."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    (said,) = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    return said


def test_a_port_in_use(random_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = complaint(serve(random_model, "--port", port))
    assert said == (
        f"tokenrelay: port {port} on 127.0.0.1 is in use by another process; "
        "stop that one, or choose a port with --port"
    )


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def missing_shard(folder: Path) -> list[str]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = sorted(set(index["weight_map"].values()))[1]
    (folder / name).unlink()
    return [name]


def truncated(folder: Path) -> list[str]:
    path = sorted(folder.glob("*.safetensors"))[0]
    os.truncate(path, path.stat().st_size - 100)
    return [path.name]


def wrong_shape(folder: Path) -> list[str]:
    edit_config(folder, vocab_size=400)
    return ["model.embed_tokens.weight", ".safetensors", "400", "384"]


def unknown_architecture(folder: Path) -> list[str]:
    edit_config(folder, architectures=["PerceptronForCausalLM"], model_type="perceptron")
    return ["config.json", "PerceptronForCausalLM"]


DAMAGES = (missing_shard, truncated, wrong_shape, unknown_architecture)


@pytest.fixture(scope="module")
def bad_starts(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[list[str], subprocess.CompletedProcess[str]]]:
    """What a start with each damage said, and the names that it must say; all at once, for each imports torch."""
    whole = make_checkpoint(tmp_path_factory.mktemp("models") / "sharded", "deepseek_v3", max_shard_size="100KB")
    folders = {damage.__name__: whole.with_name(damage.__name__) for damage in DAMAGES}
    names = {}
    for damage in DAMAGES:
        shutil.copytree(whole, folders[damage.__name__])
        names[damage.__name__] = damage(folders[damage.__name__])
    with ThreadPoolExecutor() as threads:
        ended = list(threads.map(lambda folder: serve(folder, "--port", 0), folders.values()))
    return {name: (names[name], done) for name, done in zip(folders, ended, strict=True)}


@pytest.mark.parametrize("damage", [damage.__name__ for damage in DAMAGES])
def test_a_bad_checkpoint_ends_the_start_with_one_message(
    damage: str, bad_starts: dict[str, tuple[list[str], subprocess.CompletedProcess[str]]]
) -> None:
    names, done = bad_starts[damage]
    said = complaint(done)
    assert all(name in said for name in names), said


def test_nothing_outlives_a_killed_supervisor(start: Callable[..., Server], random_model: Path) -> None:
    server = start(random_model, "--dtype", "float32")
    children = [server.worker_pid, int(server.facts["router_pid"])]
    assert all(map(alive, children))
    server.signal(signal.SIGKILL)
    server.end()
    until(lambda: not any(map(alive, children)), 10)

"""Sequences that go on at another worker: their text is the same, with no token twice and none missing."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from mock_worker import MockWorker, Script
from router_stack import Stack, until

from tokenrelay.proto import worker_pb2
from tokenrelay.services.router.config import RouterConfig
from tokenrelay.services.router.policies import Wish
from tokenrelay.services.router.service import RouterService

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "Hi"}]}
TEXT = "The quick brown fox jumps over the lazy dog, and reads the file notes.txt. " * 3


@dataclasses.dataclass
class Fleet(Stack):
    """A router in front of several workers; `worker` is the first."""

    workers: list[MockWorker]

    def goes_on(self, text: str = TEXT, **script: Any) -> None:
        """Every worker continues this text from where a sequence stands, as a deterministic model would."""
        for worker in self.workers:
            token_ids = [*worker.ids(text), worker.eos]
            worker.host.answer = lambda submit, ids=token_ids: Script(ids[emitted(submit) :], **script)

    def serving(self) -> list[MockWorker]:
        """Workers that run something."""
        return [worker for worker in self.workers if worker.running]

    @property
    def moves(self) -> dict[str, int]:
        """Moves by cause."""
        return dict(self.service.state.metrics.moves)


def emitted(submit: worker_pb2.Submit) -> int:
    """How many output tokens a sequence brings along."""
    return len(submit.token_ids) // 4 - submit.output_start


StartFleet = Callable[..., Awaitable[Fleet]]


@pytest.fixture
async def start_fleet(tmp_path: Path, model_folder: Path) -> AsyncIterator[StartFleet]:
    fleets: list[Fleet] = []

    async def start(count: int = 2, **settings: Any) -> Fleet:
        workers = [MockWorker(f"unix:{tmp_path}/{index}", model_folder) for index in range(count)]
        for worker in workers:
            await worker.start()
        targets = tuple(worker.address for worker in workers)
        service = RouterService(dataclasses.replace(RouterConfig(), port=0, worker=targets, **settings))
        port = await service.start()
        http = aiohttp.ClientSession()
        fleet = Fleet(workers[0], service, f"http://127.0.0.1:{port}", http, workers)
        fleets.append(fleet)
        await until(lambda: len(service.pool.usable) == count)
        fleet.goes_on()
        return fleet

    yield start
    for fleet in fleets:
        await fleet.http.close()
        await asyncio.wait_for(fleet.service.stop(), 10)
        await asyncio.wait_for(asyncio.gather(*(worker.stop() for worker in fleet.workers)), 10)


def spoken(events: list[Any]) -> str:
    """The text of a stream that ended well, with one end."""
    assert events.count("[DONE]") == 1, events[-1]
    chunks = [event["choices"][0] for event in events[:-1]]
    assert sum(chunk["finish_reason"] is not None for chunk in chunks) == 1
    return "".join(chunk["delta"].get("content", "") for chunk in chunks)


async def test_streams_of_a_dead_worker_go_on_elsewhere(start_fleet: StartFleet) -> None:
    fleet = await start_fleet()
    for worker in fleet.workers:
        worker.host.step_s = 0.005
    streams = [asyncio.create_task(fleet.stream(CHAT, BODY)) for _ in range(8)]
    await until(lambda: fleet.service.state.metrics.streams_open == 8)
    before = fleet.workers[0].running
    await fleet.workers[0].stop()
    for events in await asyncio.wait_for(asyncio.gather(*streams), 20):
        assert spoken(events) == TEXT
    assert 0 < fleet.moves["lost"] <= before
    assert any(emitted(submit) > 0 for submit in fleet.workers[1].submits), "none was in the middle: nothing is shown"
    async with fleet.http.get(fleet.url + "/metrics") as response:
        assert f'tokenrelay_moves_total{{cause="lost"}} {fleet.moves["lost"]}' in await response.text()


async def test_what_moves_is_the_same_request(start_fleet: StartFleet) -> None:
    fleet = await start_fleet()
    for worker in fleet.workers:
        worker.host.step_s = 0.01
    body = {**BODY, "n": 2, "seed": 7, "max_tokens": 40, "temperature": 0.5, "logprobs": True, "top_logprobs": 1}
    reply = asyncio.create_task(fleet.post(CHAT, body))
    await until(lambda: sum(worker.running for worker in fleet.workers) == 2)
    first = fleet.serving()[0]
    await until(lambda: first.host.stats().output_tokens >= 8)
    await first.stop()
    status, answer = await asyncio.wait_for(reply, 10)
    assert status == 200
    other = next(worker for worker in fleet.workers if worker is not first)
    assert len(first.submits) == len(other.submits) == 2, "the choices stay together"
    for before, after in zip(first.submits, other.submits, strict=True):
        assert emitted(after) >= 4
        assert after.token_ids.startswith(before.token_ids)
        for field in ("output_start", "tokens_max", "seed", "sampling", "salt", "priority"):
            assert getattr(after, field) == getattr(before, field), field
        assert after.deadline_left_ms <= before.deadline_left_ms
    assert [submit.choice for submit in other.submits] == [0, 1]
    ids = fleet.worker.ids(TEXT)[:40]
    for choice in answer["choices"]:
        assert choice["finish_reason"] == "length"
        assert len(choice["logprobs"]["content"]) == 40
        assert choice["message"]["content"] == fleet.worker.tokenizer.decode(ids)
    assert answer["usage"]["completion_tokens"] == 80


async def test_a_stop_string_across_the_move(start_fleet: StartFleet) -> None:
    fleet = await start_fleet()
    for worker in fleet.workers:
        worker.host.step_s = 0.01
    stop = TEXT[:120][-60:]
    stream = asyncio.create_task(fleet.stream(CHAT, {**BODY, "stop": [stop]}))
    await until(lambda: bool(fleet.serving()))
    first = fleet.serving()[0]
    half = len(first.ids(TEXT[:80]))  # in the middle of the stop string
    await until(lambda: first.host.stats().output_tokens >= half)
    await first.stop()
    assert spoken(await asyncio.wait_for(stream, 10)) == TEXT[: TEXT.index(stop)]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_worker_that_drains_is_left(start_fleet: StartFleet, stream: bool) -> None:
    fleet = await start_fleet()
    drains = Script([], refuse=worker_pb2.REJECT_DRAINING, error="unavailable: the worker drains")
    fleet.workers[0].host.answer = lambda submit: drains
    for _ in range(4):
        if stream:
            assert spoken(await fleet.stream(CHAT, BODY)) == TEXT
        else:
            assert (await fleet.chat())["choices"][0]["message"]["content"] == TEXT
    assert len(fleet.workers[0].submits) == 1, "after the first refusal nothing new goes there"
    assert fleet.moves == {"drain": 1}
    # In its next life it is used again.
    await fleet.workers[0].stop()
    await until(lambda: not fleet.service.pool.clients[0].ready)
    fleet.goes_on()
    await fleet.workers[0].start()
    await until(lambda: len(fleet.service.pool.usable) == 2)


async def test_a_full_worker_sends_on_and_full_workers_answer_429(start_fleet: StartFleet) -> None:
    fleet = await start_fleet(3)
    full = Script([], refuse=worker_pb2.REJECT_QUEUE_FULL, error="overloaded: 1024 requests wait")
    for worker in fleet.workers[:2]:
        worker.host.answer = lambda submit: full
    for _ in range(3):
        assert (await fleet.chat())["choices"][0]["message"]["content"] == TEXT
    fleet.workers[2].host.answer = lambda submit: full
    async with fleet.http.post(fleet.url + CHAT, json=BODY) as response:
        assert response.status == 429
        assert "Retry-After" in response.headers
    assert all(len(worker.submits) <= 4 for worker in fleet.workers), "nobody is asked twice for one request"


async def test_all_workers_die_and_one_comes_back(start_fleet: StartFleet) -> None:
    fleet = await start_fleet()
    for worker in fleet.workers:
        worker.host.step_s = 0.005
    streams = [asyncio.create_task(fleet.stream(CHAT, BODY)) for _ in range(4)]
    await until(lambda: fleet.service.state.metrics.streams_open == 4)
    await asyncio.gather(*(worker.stop() for worker in fleet.workers))
    await until(lambda: not fleet.service.pool.usable)
    await asyncio.sleep(0.05)
    assert not any(stream.done() for stream in streams)
    await fleet.workers[1].start()
    for events in await asyncio.wait_for(asyncio.gather(*streams), 20):
        assert spoken(events) == TEXT


async def test_a_new_request_waits_out_a_moment_without_workers(start_fleet: StartFleet) -> None:
    fleet = await start_fleet(move_wait_s=1.0)
    await asyncio.gather(*(worker.stop() for worker in fleet.workers))
    await until(lambda: not fleet.service.pool.usable)
    early = asyncio.create_task(fleet.chat())
    await asyncio.sleep(0.05)
    assert not early.done()
    await fleet.workers[0].start()
    assert (await asyncio.wait_for(early, 10))["choices"][0]["message"]["content"] == TEXT
    await fleet.workers[0].stop()
    await until(lambda: not fleet.service.pool.usable)
    await asyncio.sleep(1.1)
    began_s = asyncio.get_running_loop().time()
    assert (await fleet.post(CHAT, BODY))[0] == 503, "nobody came for long: said at once"
    assert asyncio.get_running_loop().time() - began_s < 0.5


async def test_the_wait_for_a_worker_is_bounded(start_fleet: StartFleet) -> None:
    fleet = await start_fleet(move_wait_s=0.2)
    for worker in fleet.workers:
        worker.host.step_s = 0.005
    streams = [asyncio.create_task(fleet.stream(CHAT, BODY)) for _ in range(3)]
    await until(lambda: fleet.service.state.metrics.streams_open == 3)
    await asyncio.gather(*(worker.stop() for worker in fleet.workers))
    for events in await asyncio.wait_for(asyncio.gather(*streams), 5):
        assert "[DONE]" not in events
        assert [event["error"]["code"] for event in events if "error" in event] == ["unavailable"]
    assert fleet.service.state.metrics.requests_open == 0


async def test_a_request_that_kills_its_worker_does_not_end_the_fleet(start_fleet: StartFleet) -> None:
    fleet = await start_fleet(4, moves_max=2)
    deaths: list[asyncio.Task[None]] = []

    def deadly(worker: MockWorker) -> Callable[[worker_pb2.Submit], Script]:
        def answer(submit: worker_pb2.Submit) -> Script:
            deaths.append(asyncio.create_task(worker.stop()))
            return Script([], finish=worker_pb2.FINISH_NONE)

        return answer

    for worker in fleet.workers:
        worker.host.answer = deadly(worker)
    status, reply = await asyncio.wait_for(fleet.post(CHAT, BODY), 10)
    assert (status, reply["error"]["code"]) == (503, "unavailable")
    assert len(deaths) == 3, "the first, and two moves"
    await asyncio.gather(*deaths)
    assert len(fleet.service.pool.usable) == 1


async def test_a_client_that_leaves_while_its_sequence_waits_leaves_nothing(start_fleet: StartFleet) -> None:
    fleet = await start_fleet()
    for worker in fleet.workers:
        worker.host.step_s = 0.005
    stream = asyncio.create_task(fleet.stream(CHAT, BODY))
    await until(lambda: fleet.service.state.metrics.streams_open == 1)
    await asyncio.gather(*(worker.stop() for worker in fleet.workers))
    await until(lambda: not fleet.service.pool.usable)
    stream.cancel()
    await until(lambda: fleet.service.state.metrics.requests_open == 0)
    await fleet.workers[0].start()
    await until(lambda: len(fleet.service.pool.usable) == 1)
    await asyncio.sleep(0.05)
    assert fleet.workers[0].running == 0


@pytest.mark.parametrize("seed", range(4))
async def test_random_deaths(start_fleet: StartFleet, seed: int) -> None:
    """Workers die and come back at random: every request ends right."""
    rng = random.Random(seed)
    fleet = await start_fleet(3, moves_max=12)
    for worker in fleet.workers:
        worker.host.step_s = 0.002
    streams = [asyncio.create_task(fleet.stream(CHAT, BODY)) for _ in range(24)]
    for _ in range(5):
        await asyncio.sleep(rng.uniform(0.01, 0.06))
        worker = rng.choice(fleet.workers)
        await worker.stop()
        await asyncio.sleep(rng.uniform(0.0, 0.02))
        await worker.start()
    for events in await asyncio.wait_for(asyncio.gather(*streams), 30):
        assert spoken(events) == TEXT
    await until(lambda: fleet.service.state.metrics.requests_open == 0)
    await until(lambda: not any(worker.running for worker in fleet.workers))


async def test_a_next_turn_goes_where_its_prompt_is_cached(start_fleet: StartFleet) -> None:
    fleet = await start_fleet(3)
    for worker in fleet.workers:
        worker.host.reply.next_turns = True
    for client in fleet.service.pool.clients:
        assert client.handshake is not None
        client.handshake.next_turns = True
    system = {"role": "system", "content": "The quick brown fox. " * 300}
    conversations = [[system, {"role": "user", "content": f"question {number}"}] for number in range(6)]
    homes: dict[int, set[int]] = {}
    for turn in range(4):
        for number, messages in enumerate(conversations):
            before = [len(worker.submits) for worker in fleet.workers]
            status, reply = await fleet.post(CHAT, {"messages": messages})
            assert status == 200
            went = [len(worker.submits) > had for worker, had in zip(fleet.workers, before, strict=True)].index(True)
            homes.setdefault(number, set()).add(went)
            messages += [reply["choices"][0]["message"], {"role": "user", "content": f"and then, {turn}"}]
    assert all(len(visited) == 1 for visited in homes.values()), "a conversation stays with one worker"
    assert len(set.union(*homes.values())) > 1, "conversations spread over the workers"


async def test_affinity_gives_way_to_load(start_fleet: StartFleet) -> None:
    fleet = await start_fleet(2)
    pool = fleet.service.pool
    first, second = pool.clients
    wish = Wish(second, "has it")
    assert pool.choose(wish=wish).worker is second
    for worker in fleet.workers:
        worker.host.answer = lambda submit: Script([], finish=worker_pb2.FINISH_NONE)
    for _ in range(5):
        second.submit(worker_pb2.Submit(token_ids=b"\0" * 4, output_start=1, tokens_max=2), lambda output: None)
    pick = pool.choose(wish=wish)
    assert pick.worker is first
    assert f"{second.target} has it, but is far busier" in str(pick)
    assert pool.choose(without={first.target}, wish=wish).worker is second
